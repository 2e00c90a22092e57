"""Which tokens are the patches: found by changing corners of the images and looking which tokens move.

Shapes: N tokens = P prefix tokens + G grid tokens (height x width, row-major), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spvit.errors import UnsupportedHostError
from spvit.hosts.behaviour.watch import Pass, silenced, stopped_at


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
    source = _module_of_images(twin, seen, images)
    height, width = _read_by(twin.get_submodule(source), images)
    image = images[:1]
    corners = {"top left": (0, 0), "top right": (0, width - 1), "bottom left": (height - 1, 0)}
    corners["bottom right"] = (height - 1, width - 1)
    changed = image.repeat(len(corners), 1, 1, 1)
    for number, (row, column) in enumerate(corners.values()):
        changed[number, :, row, column] += 10
    with silenced(twin, silent):
        arrived = stopped_at(twin, torch.cat([image, changed]), module)
    if arrived.dim() not in (3, 4):
        raise UnsupportedHostError(
            f"{block} takes a tensor {list(arrived.shape)}, expected tokens [batch, tokens, width] or a map [batch, "
            "height, width, width of a token]"
        )
    arrived = (arrived.transpose(0, 1) if token_first else arrived).flatten(1, -2)
    moved = (arrived[1:] - arrived[:1]).abs().amax(-1).argmax(-1).tolist()
    prefix, across, down = moved[0], moved[1] - moved[0] + 1, 0
    if across > 0:
        down = (moved[2] - moved[0]) // across + 1
    expected = [prefix, prefix + across - 1, prefix + (down - 1) * across, prefix + down * across - 1]
    if moved != expected or prefix + down * across != arrived.shape[1] or across < 1 or down < 1:
        where = ", ".join(f"{name} to {token}" for name, token in zip(corners, moved))
        raise UnsupportedHostError(
            f"the tokens of {block} are not patches row by row behind prefix tokens: of {arrived.shape[1]} tokens the "
            f"image's corners go {where}"
        )
    return Tokens(prefix, (down, across), source)


def _read_by(module: nn.Module, images: Tensor) -> list[int]:
    """Return how many rows and columns of images a module reads: a convolution leaves out what fills no patch."""
    sizes = list(images.shape[2:])
    if not isinstance(module, nn.Conv2d) or isinstance(module.padding, str):
        return sizes
    geometry = zip(sizes, module.kernel_size, module.stride, module.padding)
    return [
        min(size, (size + 2 * pad - kernel) // stride * stride + kernel - pad) for size, kernel, stride, pad in geometry
    ]


def _module_of_images(twin: nn.Module, seen: Pass, images: Tensor) -> str:
    """Return the first module without modules inside that takes the images."""
    for path, calls in seen.calls.items():
        args = calls[0].args
        leaf = not any(True for _ in twin.get_submodule(path).children())
        if leaf and args and isinstance(args[0], Tensor) and args[0].shape == images.shape:
            return path
    return ""
