"""The patch grid: how it lies in the tokens that attention gets, and how it follows the size of the images.

Shapes: B batch, N tokens = P prefix tokens + G grid tokens (height x width, row-major), C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from spvit.errors import GridError


@dataclass
class Grid:
    """The patch grid of the images that a block now works on, kept up to date by hooks of the host's family."""

    height: int
    width: int

    def gather(self, x: Tensor, prefix_tokens: int) -> Tensor:
        """Return the grid tokens, row-major [B, G, C], of what attention gets: [B, N, C].

        A family whose attention gets the grid in another form has a subclass for it.
        """
        return x[:, prefix_tokens:]

    def scatter(self, tokens: Tensor) -> Tensor:
        """Return grid tokens [B, G, C] in the form in which attention answers (without prefix tokens)."""
        return tokens

    def as_map(self, tokens: Tensor) -> Tensor:
        """Return grid tokens [B, G, C] as a map [B, C, height, width] (channels last in memory, no copy).

        Raises:
            GridError: their number is not height x width.
        """
        try:
            # No comparison of sizes before: it would bake them into a traced or exported program.
            planes = tokens.unflatten(1, (self.height, self.width))
        except RuntimeError as error:
            raise GridError(
                f"a convolution got {tokens.shape[1]} grid tokens, expected a grid of {self.height} x {self.width}; "
                "call the whole model on images, and do not drop patches"
            ) from error
        return planes.permute(0, 3, 1, 2)


def as_tokens(feature_map: Tensor) -> Tensor:
    """Return a map [B, C, height, width] as grid tokens [B, G, C]."""
    return feature_map.permute(0, 2, 3, 1).flatten(1, 2)


@dataclass
class GridTracker:
    """A forward pre-hook for a host's patch embedding: keeps the grid at the size of the images that pass.

    A dataclass of plain values, so that a hooked model can be copied and saved.
    """

    grid: Grid
    patch: tuple[int, int]
    pads: bool

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Set the grid from images [B, C, height, width]."""
        extra = [size - 1 if self.pads else 0 for size in self.patch]
        height, width = arguments[0].shape[2], arguments[0].shape[3]
        self.grid.height = (height + extra[0]) // self.patch[0]
        self.grid.width = (width + extra[1]) // self.patch[1]
