"""timm's SwinTransformer: any window, image and patch size, shifted windows, padding.

While searching, timm's block stays as it is: it shifts, pads and cuts its map into windows, and the gated layer takes
them apart for its convolutions, which act on the whole map. Once an attention layer is replaced, its block is told that
its one window is the map, so that nothing is shuffled.

Shapes: B batch, N tokens of a window, D width, G = height x width tokens of a map (row-major), C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.layers import Mlp
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, SwinTransformerStage, WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

from spvit.errors import UnsupportedHostError
from spvit.hosts.base import AttentionSite, BlockSites, FFNSite, expect
from spvit.hosts.timm_models import describe_timm_model, make_timm_model, read_packed_attention
from spvit.kernels import AttentionWeights
from spvit.pruned import Grid
from spvit.searchable import AttentionAccess


def read_attention(attention: nn.Module) -> AttentionWeights:
    """Return the shared weights of a window attention, whose query, key and value projections are packed."""
    layer = cast(WindowAttention, attention)
    return read_packed_attention(layer.qkv, layer.proj, layer.num_heads)


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
            raise ValueError(
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


@dataclass
class WindowTracker:
    """A forward pre-hook for a block: keeps a grid at the block's map and windows."""

    grid: WindowedGrid

    def __call__(self, block: SwinTransformerBlock, arguments: tuple[Tensor, ...]) -> None:
        """arguments: a map [B, height, width, D]."""
        self.grid.height, self.grid.width = arguments[0].shape[1:3]
        self.grid.window, self.grid.shift = block.window_size, block.shift_size


@dataclass
class WholeMap:
    """A forward pre-hook for a block whose attention is replaced: its one window is the map that passes."""

    grid: Grid

    def __call__(self, block: SwinTransformerBlock, arguments: tuple[Tensor, ...]) -> None:
        """arguments: a map [B, height, width, D]."""
        height, width = arguments[0].shape[1:3]
        self.grid.height, self.grid.width = height, width
        block.window_size, block.window_area = (height, width), height * width


class TimmSwin:
    """Adapter of timm's SwinTransformer."""

    name = "timm SwinTransformer"
    temperature = 100.0
    access = AttentionAccess(read=read_attention, value_projection="qkv", returns_tuple=False)

    def blocks(self, host: nn.Module) -> tuple[BlockSites, ...]:
        """Return the sites of every block."""
        return tuple(self._block(host, path, block) for path, block in self._walk(host))

    def _walk(self, host: nn.Module) -> Iterator[tuple[str, SwinTransformerBlock]]:
        for index, stage in enumerate(cast(SwinTransformer, host).layers):
            expect(stage, SwinTransformerStage, f"layers.{index}", self.name)
            for inner, block in enumerate(cast(SwinTransformerStage, stage).blocks):
                path = f"layers.{index}.blocks.{inner}"
                expect(block, SwinTransformerBlock, path, self.name)
                yield path, cast(SwinTransformerBlock, block)

    def _block(self, host: nn.Module, path: str, block: SwinTransformerBlock) -> BlockSites:
        attention, ffn = cast(WindowAttention, block.attn), cast(Mlp, block.mlp)
        expect(attention, WindowAttention, f"{path}.attn", self.name)
        expect(ffn, Mlp, f"{path}.mlp", self.name)
        for owner, name, parts in ((attention, "attn", ("qkv", "proj")), (ffn, "mlp", ("fc1", "fc2"))):
            for part in parts:
                expect(getattr(owner, part), nn.Linear, f"{path}.{name}.{part}", self.name)
        if not isinstance(ffn.norm, nn.Identity):
            raise UnsupportedHostError(
                f"{path}.mlp.norm is a {type(ffn.norm).__name__} over the hidden units, which pruning would change; "
                "use a model without a norm there"
            )
        grid = _windowed(block)
        stage = path.partition(".blocks.")[0]
        reduces = path.endswith(".blocks.0") and not isinstance(host.get_submodule(f"{stage}.downsample"), nn.Identity)
        return BlockSites(
            path,
            AttentionSite(
                path=f"{path}.attn",
                norm=f"{path}.norm1",
                dim=attention.qkv.in_features,
                heads=attention.num_heads,
                head_width=attention.proj.in_features // attention.num_heads,
                prefix_tokens=0,
                grid=(grid.height, grid.width),
                keys=attention.window_area,
                windows=math.prod(grid.windows()),
                layout=grid,
            ),
            FFNSite(f"{path}.mlp.fc1", f"{path}.mlp.fc2", ffn.fc1.out_features),
            before=f"{stage}.downsample" if reduces else None,
        )

    def input_size(self, host: nn.Module) -> tuple[int, int, int]:
        """Return (channels, height, width) of the images that the host takes."""
        embed = cast(SwinTransformer, host).patch_embed
        return (embed.proj.in_channels, embed.img_size[0], embed.img_size[1])

    def track_grids(self, host: nn.Module, blocks: Sequence[int], whole: bool) -> dict[int, Grid]:
        """Return a grid a block, which each block keeps at its own map."""
        grids: dict[int, Grid] = {}
        every = [block for _, block in self._walk(host)]
        for index in blocks:
            block = every[index]
            if whole:
                size = block.input_resolution
                grids[index] = Grid(*size)
                block.window_size, block.window_area = size, math.prod(size)
                block.shift_size, block.attn_mask = (0, 0), None
                block.register_forward_pre_hook(WholeMap(grids[index]))
            else:
                windowed = _windowed(block)
                grids[index] = windowed
                block.register_forward_pre_hook(WindowTracker(windowed))
        return grids

    def source(self, host: nn.Module) -> dict[str, Any]:
        """Return the timm model name and arguments that the host was created with."""
        return describe_timm_model(host)

    def build(self, source: dict[str, Any]) -> nn.Module:
        """Make a timm model from its name and arguments."""
        return make_timm_model(source)


def _windowed(block: SwinTransformerBlock) -> WindowedGrid:
    height, width = block.input_resolution
    return WindowedGrid(height, width, block.window_size, block.shift_size)


FAMILY = TimmSwin()
