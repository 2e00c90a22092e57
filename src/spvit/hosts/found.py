"""A family that is data: sites that were found by behaviour, declared by a user, or read from a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from spvit.hosts.gathered import GatheredGrid, Layout, OwnSize
from spvit.hosts.grid import Grid, GridTracker
from spvit.hosts.sites import BlockSites, Undo


@dataclass(frozen=True)
class FoundFamily:
    """The family of one model whose sites are known."""

    name: str
    """How messages call it."""
    sites: tuple[BlockSites, ...]
    size: tuple[int, int, int]
    """(channels, height, width) of the images of the model's own size."""
    images: str = ""
    """Dotted name of the module that takes the images as its first argument; empty: the model itself."""
    classes_told_apart: int = 0
    temperature: float = 0.01

    def blocks(self, model: nn.Module) -> tuple[BlockSites, ...]:
        """Return the sites of every block."""
        return self.sites

    def input_size(self, model: nn.Module) -> tuple[int, int, int]:
        """Return (channels, height, width) of the images that the model takes."""
        return self.size

    def classes(self, model: nn.Module) -> int:
        """Return how many classes the head tells apart; 0 when the model has no head."""
        return self.classes_told_apart

    def watch_grids(self, model: nn.Module, blocks: Sequence[int]) -> tuple[dict[int, Grid], list[Undo]]:
        """Return the grids of blocks: one for those that get their tokens plainly and alike, which follows the images.

        Windows are those of the model's own size, so that it then refuses images of others.
        """
        grids: dict[int, Grid] = {}
        shared: dict[tuple[int, int], Grid] = {}
        undos: list[Undo] = []
        module, device = model.get_submodule(self.images), next(model.parameters()).device
        for index in blocks:
            site = self.sites[index].attention
            if isinstance(site.layout, Layout):
                grids[index] = GatheredGrid(*site.grid, site.layout).to(device)
                continue
            if site.grid not in shared:
                shared[site.grid] = Grid(*site.grid)
                tracker = GridTracker(shared[site.grid], self._patch(module, site.grid), pads=False)
                undos.append(module.register_forward_pre_hook(tracker).remove)
            grids[index] = shared[site.grid]
        if any(isinstance(grid, GatheredGrid) for grid in grids.values()):
            undos.append(module.register_forward_pre_hook(OwnSize(self.size[1:])).remove)
        return grids, undos

    def _patch(self, module: nn.Module, grid: tuple[int, int]) -> tuple[int, int]:
        """Return (height, width) of the images' patches, which need not fill them."""
        if isinstance(module, nn.Conv2d):
            stride = (module.stride[0], module.stride[1])
            if (self.size[1] // stride[0], self.size[2] // stride[1]) == grid:
                return stride
        return self.size[1] // grid[0], self.size[2] // grid[1]

    whole_grids = watch_grids
