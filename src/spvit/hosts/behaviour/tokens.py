"""Which tokens are the patches: found by changing corners of the images and looking which tokens move.

Shapes: N tokens = P prefix tokens + G grid tokens (height x width, row-major), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from spvit.errors import UnsupportedHostError
from spvit.hosts.behaviour.watch import Pass, silenced, stopped_at

CORNERS = {"top left": (0, 0), "top right": (0, -1), "bottom left": (-1, 0), "bottom right": (-1, -1)}


@dataclass(frozen=True)
class Tokens:
    """How the tokens of the first block lie."""

    prefix: int
    grid: tuple[int, int]
    """(height, width)."""
    images: str
    """Dotted name of the first module that takes the images; empty: the model itself."""

    @property
    def count(self) -> int:
        """All tokens of one image."""
        return self.prefix + self.grid[0] * self.grid[1]


def find_tokens(
    twin: nn.Module, seen: Pass, images: Tensor, block: str, token_first: bool, silent: Sequence[str] = ()
) -> Tokens:
    """Return how tokens lie where they enter a block, the first one or behind attention layers, which are silenced.

    Raises:
        UnsupportedHostError: they are not the row-major patches behind some prefix tokens.
    """
    first = twin.get_submodule(block)
    module = first[0] if isinstance(first, nn.ModuleList) else first
    alike, moved = images[:1].repeat(1 + len(CORNERS), 1, 1, 1), []
    with silenced(twin, silent):
        given = stopped_at(twin, alike, module)
        if given.dim() not in (3, 4):
            raise UnsupportedHostError(
                f"{block} takes a tensor {list(given.shape)}, expected tokens [batch, tokens, width] or a map [batch, "
                "height, width, width of a token]"
            )
        count = len(given) if token_first else given.shape[1:-1].numel()
        conv = _convolution_before(twin, seen, block, count)
        if conv is not None:
            handle = conv.register_forward_hook(lambda module, args, output: _changed(output))
            try:
                moved.append(stopped_at(twin, alike, module))
            finally:
                handle.remove()
        moved.append(stopped_at(twin, _changed(alike), module))
    for arrived in moved:
        rows = (arrived.transpose(0, 1) if token_first else arrived).flatten(1, -2)
        found = (rows[1:] - rows[:1]).abs().amax(-1).argmax(-1).tolist()
        prefix, across = found[0], found[1] - found[0] + 1
        down = (found[2] - prefix) // across + 1 if across > 0 else 0
        corners = [prefix, prefix + across - 1, prefix + (down - 1) * across, prefix + down * across - 1]
        if found == corners and prefix + down * across == count and across > 0 and down > 0:
            return Tokens(prefix, (down, across), _module_of_images(twin, seen, images))
    where = ", ".join(f"{name} to {token}" for name, token in zip(CORNERS, found))
    raise UnsupportedHostError(
        f"the tokens of {block} are not patches row by row behind prefix tokens: of {count} tokens the image's corners "
        f"go {where}"
    )


def _changed(maps: Tensor) -> Tensor:
    """Return images or maps [1 + corners, C, height, width] with another corner changed in each but the first."""
    maps = maps.clone()
    for number, (row, column) in enumerate(CORNERS.values(), start=1):
        maps[number, :, row, column] += 10 * maps[0].std()
    return maps


def _convolution_before(twin: nn.Module, seen: Pass, block: str, count: int) -> nn.Module | None:
    """Return the last convolution before a block whose map may be its tokens.

    What changes in images arrives blurred behind many convolutions; what changes in that map does not.
    """
    began = min(calls[0].order for path, calls in seen.calls.items() if f"{path}.".startswith(f"{block}."))
    ran = {
        calls[0].order: module
        for path, calls in seen.calls.items()
        if isinstance(module := twin.get_submodule(path), nn.Conv2d) and calls[0].order < began
        if calls[0].answer is not None and count // 2 < calls[0].answer.shape[2:].numel() <= count
    }
    return ran[max(ran)] if ran else None


def _module_of_images(twin: nn.Module, seen: Pass, images: Tensor) -> str:
    """Return the first module without modules inside that takes the images."""
    for path, calls in seen.calls.items():
        args = calls[0].args
        leaf = not any(True for _ in twin.get_submodule(path).children())
        if leaf and args and isinstance(args[0], Tensor) and args[0].shape == images.shape:
            return path
    return ""
