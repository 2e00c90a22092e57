"""A family: all that is known of one model, as data; found by behaviour, by its class, or read from a file."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from torch import nn

from spvit.hosts.grid import GatheredGrid, Grid, Layout, expect_size, follow
from spvit.hosts.sites import BlockSites


@dataclass(frozen=True)
class Family:
    """What is known of one model. Methods take that model, dense or pruned."""

    name: str
    """How messages call it."""
    sites: tuple[BlockSites, ...]
    size: tuple[int, int, int]
    """(channels, height, width) of the images of the model's own size."""
    images: str = ""
    """Dotted name of the module that takes the images as its first argument; empty: the model itself."""
    classes_told_apart: int = 0
    temperature: float = 0.01
    """Default temperature of the head mix (alpha)."""

    def input_size(self, model: nn.Module) -> tuple[int, int, int]:
        """Return (channels, height, width) of the images that the model takes."""
        return self.size

    def classes(self, model: nn.Module) -> int:
        """Return how many classes the head tells apart; 0 when the model has no head."""
        return self.classes_told_apart

    def watch_grids(self, model: nn.Module, blocks: Sequence[int], undo: ExitStack) -> dict[int, Grid]:
        """Return the grids of blocks by index, as their attention gets them, kept at the size of the images by hooks.

        Blocks that get their tokens plainly and alike share one. Windows are those of the model's own size, so that it
        then refuses images of others. Closing `undo` takes back what was changed of the model.
        """
        grids: dict[int, Grid] = {}
        shared: dict[tuple[int, int], Grid] = {}
        module, device = model.get_submodule(self.images), next(model.parameters()).device
        for index in blocks:
            site = self.sites[index].attention
            if isinstance(site.layout, Layout):
                grids[index] = GatheredGrid(*site.grid, site.layout).to(device)
                continue
            if site.grid not in shared:
                shared[site.grid] = Grid(*site.grid)
                hook = partial(follow, shared[site.grid], self._patch(module, site.grid))
                undo.callback(module.register_forward_pre_hook(hook).remove)
            grids[index] = shared[site.grid]
        if any(isinstance(grid, GatheredGrid) for grid in grids.values()):
            undo.callback(module.register_forward_pre_hook(partial(expect_size, self.size[1:])).remove)
        return grids

    def whole_grids(self, model: nn.Module, blocks: Sequence[int], undo: ExitStack) -> dict[int, Grid]:
        """Return the same for blocks whose attention is replaced, which may then get the grid in another way."""
        return self.watch_grids(model, blocks, undo)

    def _patch(self, module: nn.Module, grid: tuple[int, int]) -> tuple[int, int]:
        """Return (height, width) of the images' patches, which need not fill them, or may reach beyond them."""
        if isinstance(module, nn.Conv2d):
            down, across = module.stride[0], module.stride[1]
            fewest = (self.size[1] // down, self.size[2] // across)
            if grid in (fewest, (-(-self.size[1] // down), -(-self.size[2] // across))):
                return down, across
        return self.size[1] // grid[0], self.size[2] // grid[1]
