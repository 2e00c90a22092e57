"""timm's SwinTransformer: any window, image and patch size, shifted windows, padding.

While searching, timm's block stays as it is: it shifts, pads and cuts its map into windows, and the gated layer takes
them apart for its convolutions, which act on the whole map. Once an attention layer is replaced, its block is told that
its one window is the map, so that nothing is shuffled.

Shapes: B batch, N tokens of a window, D width, G = height x width tokens of a map (row-major), C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, SwinTransformerStage, WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

from spvit.errors import GridError, UnsupportedHostError
from spvit.hosts.grid import Grid
from spvit.hosts.sites import AttentionSite, Bias, BlockSites, expect
from spvit.hosts.timm_models import TimmFamily, input_size, parts

NAME = "timm SwinTransformer"
TEMPERATURE = 100.0
WINDOWS = ("window_size", "window_area", "shift_size", "attn_mask")


@dataclass
class WindowedGrid(Grid):
    """A grid that attention gets rolled up and left by `shift`, padded at the bottom and right, and in windows."""

    window: tuple[int, int]
    shift: tuple[int, int]

    def windows(self) -> tuple[int, int]:
        """Return how many windows there are, down and across."""
        return math.ceil(self.height / self.window[0]), math.ceil(self.width / self.window[1])

    def gather(self, x: Tensor, prefix_tokens: int) -> Tensor:
        """x: [B x windows, N, C]. Returns the tokens of the map, [B, G, C], without padding."""
        down, across = self.windows()
        if x.shape[0] % (down * across) or x.shape[1] != self.window[0] * self.window[1]:
            raise GridError(
                f"a convolution got {x.shape[0]} windows of {x.shape[1]} tokens, expected {down * across} an image of "
                f"{self.window[0]} x {self.window[1]}; call the whole model on images"
            )
        padded = x.unflatten(1, self.window).unflatten(0, (-1, down, across)).transpose(2, 3)  # [B, down, h, across, w]
        rolled = padded.flatten(3, 4).flatten(1, 2)[:, : self.height, : self.width]
        return torch.roll(rolled, self.shift, dims=(1, 2)).flatten(1, 2)

    def scatter(self, tokens: Tensor) -> Tensor:
        """tokens: [B, G, C]. Returns [B x windows, N, C]; what stands in padding is dropped by the block."""
        down, across = self.windows()
        planes = tokens.unflatten(1, (self.height, self.width))
        rolled = torch.roll(planes, (-self.shift[0], -self.shift[1]), dims=(1, 2))
        missing = (down * self.window[0] - self.height, across * self.window[1] - self.width)
        padded = F.pad(rolled, (0, 0, 0, missing[1], 0, missing[0]))
        cut = padded.unflatten(2, (across, self.window[1])).unflatten(1, (down, self.window[0])).transpose(2, 3)
        return cut.flatten(3, 4).flatten(0, 2)


def _follow_windows(grid: WindowedGrid, block: SwinTransformerBlock, arguments: tuple[Tensor, ...]) -> None:
    """Forward pre-hook for a block that takes a map [B, height, width, D]: keep a grid at its map and windows."""
    grid.height, grid.width = arguments[0].shape[1:3]
    grid.window, grid.shift = block.window_size, block.shift_size


def _follow_map(grid: Grid, block: SwinTransformerBlock, arguments: tuple[Tensor, ...]) -> None:
    """Forward pre-hook for a block whose attention is replaced: its one window is the map that passes."""
    grid.height, grid.width = arguments[0].shape[1:3]
    _spread(block, (grid.height, grid.width))


def _spread(block: SwinTransformerBlock, size: tuple[int, int]) -> None:
    """Have a block's one window be its map."""
    block.window_size, block.window_area = size, math.prod(size)
    # The model's set_input_size brings a shift and its mask back.
    block.shift_size, block.attn_mask = (0, 0), None


class SwinFamily(TimmFamily):
    """The family of a SwinTransformer, whose blocks keep their own grids: they may take images of any size."""

    def watch_grids(self, model: nn.Module, blocks: Sequence[int], undo: ExitStack) -> dict[int, Grid]:
        """Return a windowed grid a block, which each block keeps at its own map."""
        grids: dict[int, Grid] = {}
        for index in blocks:
            block = _block_at(model, self.sites[index].path)
            grids[index] = grid = _windowed(block)
            undo.callback(block.register_forward_pre_hook(partial(_follow_windows, grid)).remove)
        return grids

    def whole_grids(self, model: nn.Module, blocks: Sequence[int], undo: ExitStack) -> dict[int, Grid]:
        """Return a grid a block, which each block keeps at its own map and hands on as one window."""
        grids: dict[int, Grid] = {}
        for index in blocks:
            block = _block_at(model, self.sites[index].path)
            grids[index] = Grid(*block.input_resolution)
            for name in WINDOWS:
                undo.callback(setattr, block, name, getattr(block, name))
            undo.callback(block.register_forward_pre_hook(partial(_follow_map, grids[index])).remove)
            _spread(block, block.input_resolution)
        return grids


def family(swin: SwinTransformer) -> SwinFamily:
    """Return the family of a SwinTransformer."""
    sites, sides = [], swin.patch_embed.grid_size
    for index, stage in enumerate(swin.layers):
        expect(swin, f"layers.{index}", SwinTransformerStage, NAME)
        sides = tuple(math.ceil(side / 2) for side in sides) if index else sides
        if (found := tuple(stage.output_resolution)) != sides:
            raise UnsupportedHostError(
                f"layers.{index} gets a map of {sides}, but timm before 1.0.31 takes it for one of {found}; update "
                "timm, or create the model for images whose maps can be halved"
            )
        sites += [_block(swin, f"layers.{index}", inner) for inner in range(len(stage.blocks))]
    return SwinFamily(NAME, tuple(sites), input_size(swin), temperature=TEMPERATURE)


def _block(swin: SwinTransformer, stage: str, inner: int) -> BlockSites:
    path = f"{stage}.blocks.{inner}"
    expect(swin, path, SwinTransformerBlock, NAME)
    shared, ffn = parts(swin, path, WindowAttention, NAME)
    grid = _windowed(_block_at(swin, path))
    reduces = inner == 0 and not isinstance(swin.get_submodule(f"{stage}.downsample"), nn.Identity)
    site = AttentionSite(
        **shared,
        norm=f"{path}.norm1",
        prefix_tokens=0,
        grid=(grid.height, grid.width),
        keys=grid.window[0] * grid.window[1],
        windows=math.prod(grid.windows()),
        layout=grid,
        narrows_values=True,
        bias=Bias("relative_position_bias_table", False, False, "relative_position_index", "mask"),
    )
    return BlockSites(path, site, ffn, before=f"{stage}.downsample" if reduces else None)


def _block_at(model: nn.Module, path: str) -> SwinTransformerBlock:
    return cast(SwinTransformerBlock, model.get_submodule(path))


def _windowed(block: SwinTransformerBlock) -> WindowedGrid:
    height, width = block.input_resolution
    return WindowedGrid(height, width, block.window_size, block.shift_size)
