"""The patch grid: how it lies in the tokens that attention gets, and how it follows the size of the images.

Shapes: B batch, N tokens = P prefix tokens + G grid tokens (height x width, row-major), C channels; S tokens that
attention gets of an image in windows or as a map, padding included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


def follow(grid: Grid, patch: tuple[int, int], module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    """Forward pre-hook for what cuts images [B, C, height, width] into patches: keep a grid at the images' size."""
    grid.height, grid.width = arguments[0].shape[2] // patch[0], arguments[0].shape[3] // patch[1]


@dataclass(frozen=True)
class Layout:
    """Which token of the map each token is that an attention layer gets: data."""

    places: tuple[int, ...]
    """Position in the map, row-major, of each of the S tokens of an image; -1: padding."""
    shape: tuple[int, ...]
    """Of what the layer takes, [B x windows, *this, D]: (tokens,) or (height, width) of a window, or of the map."""


class GatheredGrid(Grid, nn.Module):
    """A grid by a layout that was found for images of the model's own size: plain indexing.

    A module, so that its index moves between devices with the model.
    """

    to_map: Tensor
    to_layer: Tensor
    # A dataclass compares values, which modules must not.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(self, height: int, width: int, layout: Layout) -> None:
        nn.Module.__init__(self)
        Grid.__init__(self, height, width)
        self.shape = layout.shape
        places, padding = layout.places, layout.places.count(-1)
        to_map = sorted(range(len(places)), key=places.__getitem__)[padding:]
        to_layer = [height * width if place < 0 else place for place in places]
        self.register_buffer("to_map", torch.tensor(to_map), persistent=False)
        self.register_buffer("to_layer", torch.tensor(to_layer), persistent=False)

    def gather(self, x: Tensor, prefix_tokens: int) -> Tensor:
        """x: [B x windows, *shape, C]. Returns the tokens of the map, [B, G, C], without padding."""
        if x.shape[1:-1] != self.shape:
            raise GridError(
                f"a convolution got {list(x.shape)}, expected [windows, {', '.join(map(str, self.shape))}, channels] "
                f"for a map of {self.height} x {self.width}; give images of the model's own size"
            )
        return x.reshape(-1, len(self.to_layer), x.shape[-1])[:, self.to_map.to(x.device)]

    def scatter(self, tokens: Tensor) -> Tensor:
        """tokens: [B, G, C]. Returns [B x windows, *shape, C], zero in padding."""
        padded = F.pad(tokens, (0, 0, 0, 1))
        return padded[:, self.to_layer.to(tokens.device)].reshape(-1, *self.shape, tokens.shape[-1])


def expect_size(size: tuple[int, int], module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    """Forward pre-hook for what takes a model's images: raise GridError for sizes whose windows are not known."""
    found = tuple(arguments[0].shape[2:])
    if found != size:
        raise GridError(
            f"images are {found[0]} x {found[1]}, but the windows of this model's attention are known for {size[0]} x "
            f"{size[1]} only; give images of that size, or start again from the dense model: "
            "spvit.recognise(model, images)"
        )
