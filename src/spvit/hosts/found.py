"""A family that is data: sites that were found by behaviour, declared by a user, or read from a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from spvit.hosts.grid import Grid, GridTracker
from spvit.hosts.site_files import to_data
from spvit.hosts.sites import BlockSites, Undo
from spvit.hosts.sources import build, source_of


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
        """Return the grids of blocks; those of one size are one grid, which follows the size of the images."""
        grids: dict[tuple[int, int], Grid] = {}
        undos: list[Undo] = []
        module = model.get_submodule(self.images)
        for index in blocks:
            size = self.sites[index].attention.grid
            if size not in grids:
                grids[size] = Grid(*size)
                patch = (self.size[1] // size[0], self.size[2] // size[1])
                undos.append(module.register_forward_pre_hook(GridTracker(grids[size], patch, pads=False)).remove)
        return {index: grids[self.sites[index].attention.grid] for index in blocks}, undos

    whole_grids = watch_grids

    def source(self, model: nn.Module) -> dict[str, Any]:
        """Return these sites, and what makes the same dense model again where a library can, as JSON values."""
        return {**source_of(model), "family": to_data(self)}

    def build(self, source: dict[str, Any]) -> nn.Module:
        """Make a dense model with random weights from what `source` returned. Raises UnsupportedHostError."""
        return build(source)
