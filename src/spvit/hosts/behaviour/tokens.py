"""Which tokens are the patches, and how attention layers get them: in windows, or as a map.

Patches are found by changing corners of the images and looking which tokens move, windows by matching rows.

Shapes: B images, N tokens = P prefix tokens + G grid tokens (height x width, row-major), D width; S tokens that
attention gets of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spvit.errors import UnsupportedHostError
from spvit.hosts.behaviour.attention import FoundLayer
from spvit.hosts.behaviour.equations import places_of
from spvit.hosts.behaviour.watch import Call, Pass, first_tensor
from spvit.hosts.calling import answers_changed, reached
from spvit.hosts.grid import GatheredGrid, Layout

CORNERS = {"top left": (0, 0), "top right": (0, -1), "bottom left": (-1, 0), "bottom right": (-1, -1)}


@dataclass(frozen=True)
class Tokens:
    """How the tokens of a block lie."""

    prefix: int
    grid: tuple[int, int]
    """(height, width)."""
    images: str
    """Dotted name of the first module that takes the images; empty: the model itself."""

    @property
    def count(self) -> int:
        """All tokens of one image."""
        return self.prefix + self.grid[0] * self.grid[1]


def find_tokens(seen: Pass, images: Tensor, layer: FoundLayer, silent: Sequence[str]) -> Tokens:
    """Return how tokens lie where they enter a layer's block, the first or behind attention that is silenced.

    Raises:
        UnsupportedHostError: they are not the row-major patches behind some prefix tokens.
    """
    block, first = layer.block, seen.module(layer.block)
    module = first[0] if isinstance(first, nn.ModuleList) else first
    alike = images[:1].repeat(1 + len(CORNERS), 1, 1, 1)
    with answers_changed({seen.module(path): torch.zeros_like for path in silent}):
        given = reached(seen.model, _changed(alike), module, output=False)
        if given.dim() not in (3, 4):
            raise UnsupportedHostError(
                f"{block} takes a tensor {list(given.shape)}, expected tokens [batch, tokens, width] or a map [batch, "
                "height, width, width of a token]"
            )
        count, moved = len(given) if layer.token_first else given.shape[1:-1].numel(), [given]
        maps = _convolution_before(seen, block, count, len(images))
        if maps is not None:
            with answers_changed({seen.module(maps): _changed}):
                moved.insert(0, reached(seen.model, alike, module, output=False))
    for arrived in moved:
        rows = (arrived.transpose(0, 1) if layer.token_first else arrived).flatten(1, -2)
        found = (rows[1:] - rows[:1]).abs().amax(-1).argmax(-1).tolist()
        prefix, across = found[0], found[1] - found[0] + 1
        down = (found[2] - prefix) // across + 1 if across > 0 else 0
        corners = [prefix, prefix + across - 1, prefix + (down - 1) * across, prefix + down * across - 1]
        if found == corners and prefix + down * across == count and across > 0 and down > 0:
            return Tokens(prefix, (down, across), _module_of_images(seen, images))
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


def _convolution_before(seen: Pass, block: str, count: int, images: int) -> str | None:
    """Return the last convolution before a block whose map may be its tokens.

    What changes in images arrives blurred behind many convolutions; what changes in that map does not.
    """
    began = min(call.order for _, _, call in seen.inside(block))
    ran = {
        calls[0].order: path
        for path, calls in seen.calls.items()
        if isinstance(seen.module(path), nn.Conv2d) and calls[0].order < began
        if (made := calls[0].answer) is not None and len(made) == images
        if count // 2 < made.shape[2:].numel() <= count
    }
    return ran[max(ran)] if ran else None


def _module_of_images(seen: Pass, images: Tensor) -> str:
    """Return the first module without modules inside that takes the images."""
    for path, calls in seen.calls.items():
        args, leaf = calls[0].args, not any(True for _ in seen.module(path).children())
        if leaf and args and isinstance(args[0], Tensor) and args[0].shape == images.shape:
            return path
    return ""


def layout_of(
    seen: Pass, layer: FoundLayer, tokens: Tokens, call: Call | None, images: int
) -> tuple[Layout | None, str | None]:
    """Return how a layer gets its block's tokens, where not simply as they are, and the module that made them.

    call: of the block. The module is None where the block itself gets them.

    Raises:
        UnsupportedHostError: what it gets, or answers, is no rearrangement of the tokens.
    """
    given, (batch, _, count, _) = layer.tokens, layer.core.value.shape
    found = None if call is None or tokens.prefix else _rearranged(seen, layer, call, images)
    if found is not None and call is not None:
        plain = found[0].places == tuple(range(given.shape[1])) and given.dim() == 3 and len(given) == images
        if not plain:
            _check_answers(seen, layer, call, found[0])
            return found
    if given.dim() != 3 or given.shape[:2] != (images, tokens.count) or batch * count < images * tokens.count:
        raise UnsupportedHostError(
            f"{layer.path} attends to {count} tokens and takes a tensor {list(given.shape)}, but {tokens.count} tokens "
            "of an image enter its block; each must be in one window, and none merged or dropped"
        )
    return None, None


def _rearranged(seen: Pass, layer: FoundLayer, call: Call, images: int) -> tuple[Layout, str | None] | None:
    """Return how a layer's tokens lie in the first of what the block takes and makes of which they are all rows."""
    given = layer.call.tokens
    if given is None or call.tokens is None or len(given.flatten(0, -2)) % images:
        return None
    rows = given.reshape(images, -1, given.shape[-1])
    inside = sorted((own.order, name) for name, _, own in seen.inside(layer.block) if own.order < layer.call.order)
    made = [(f"{layer.block}.{name}", seen.calls[f"{layer.block}.{name}"][0].answer) for _, name in inside]
    for path, source in [(None, call.tokens), *made]:
        if source is None or source.dim() < 3 or len(source) != images or source.shape[-1] != given.shape[-1]:
            continue
        source = source.flatten(1, -2)
        places = places_of(rows[0], source[0])
        if places is None or sorted(place for place in places if place >= 0) != list(range(source.shape[1])):
            continue
        if all(places_of(*pair) == places for pair in zip(rows[1:], source[1:])):
            return Layout(places, tuple(given.shape[1:-1])), path
    return None


def _check_answers(seen: Pass, layer: FoundLayer, call: Call, layout: Layout) -> None:
    """Raise UnsupportedHostError unless what a layer answers for a token moves that token of its block alone."""
    generator = torch.Generator().manual_seed(2)
    stream = call.tokens
    assert stream is not None
    images, count = len(stream), stream.flatten(1, -2).shape[1]
    chosen = torch.rand(images, count, generator=generator) < 0.5
    code = chosen[..., None] * torch.randn(stream.shape[-1], generator=generator)
    marked = GatheredGrid(1, count, layout).scatter(code)
    padding = torch.tensor(layout.places).view(-1, *layout.shape) < 0
    marked[padding.repeat(images, *[1] * len(layout.shape))] = 1

    def answered(answer: Tensor) -> Tensor:
        with answers_changed({layer.module: lambda out: answer.to(stream)}):
            output = first_tensor(call.again(seen.module(layer.block)))
        assert output is not None
        return output.flatten(1, -2)

    moved = (answered(marked) - answered(torch.zeros_like(marked))).abs().amax(-1)
    if moved.shape != chosen.shape or not torch.equal((moved > 1e-6 * moved.max()).cpu(), chosen):
        raise UnsupportedHostError(
            f"{layer.path}: what it answers for a token of a window does not come back to that token alone"
        )
