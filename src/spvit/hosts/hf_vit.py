"""Hugging Face's ViTForImageClassification (extra `hf`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit import modeling_vit

from spvit.errors import UnsupportedHostError
from spvit.hosts.base import AttentionSite, BlockSites, FFNSite, GridTracker, expect
from spvit.kernels import AttentionWeights, Projections
from spvit.pruned import Grid
from spvit.searchable import AttentionAccess


def read_attention(attention: nn.Module) -> AttentionWeights:
    """Return the shared weights of a Hugging Face attention layer, whose projections are separate."""
    layer: Any = attention
    split = (layer.num_attention_heads, layer.head_dim)
    value_bias = layer.v_proj.bias
    return AttentionWeights(
        value_weight=layer.v_proj.weight.unflatten(0, split),
        value_bias=None if value_bias is None else value_bias.unflatten(0, split),
        out_weight=layer.o_proj.weight.unflatten(1, split),
        out_bias=layer.o_proj.bias,
    )


def read_projections(attention: nn.Module) -> Projections:
    """Return all weights of a Hugging Face attention layer."""
    layer: Any = attention
    split = (layer.num_attention_heads, layer.head_dim)
    query, key = layer.q_proj, layer.k_proj
    return Projections(
        query_weight=query.weight.unflatten(0, split),
        query_bias=None if query.bias is None else query.bias.unflatten(0, split),
        key_weight=key.weight.unflatten(0, split),
        key_bias=None if key.bias is None else key.bias.unflatten(0, split),
        shared=read_attention(attention),
        scale=layer.scaling,
        dropout=layer.attention_dropout,
        out_dropout=0.0,
    )


class HuggingFaceViT:
    """Adapter of ViTForImageClassification."""

    name = "Hugging Face ViTForImageClassification"
    temperature = 0.01
    access = AttentionAccess(
        read=read_attention, value_projection="v_proj", returns_tuple=True, read_projections=read_projections
    )

    def blocks(self, host: nn.Module) -> tuple[BlockSites, ...]:
        """Return the sites of every block."""
        vit = cast(ViTForImageClassification, host).vit
        if not hasattr(vit, "layers") or not hasattr(modeling_vit, "ViTMLP"):
            raise UnsupportedHostError(
                f"this version of transformers lays {self.name} out differently; install the one of spvit[hf]"
            )
        grid = self._grid(host)
        return tuple(self._block(vit, index, grid) for index in range(len(vit.layers)))

    def _block(self, vit: Any, index: int, grid: tuple[int, int]) -> BlockSites:
        path = f"vit.layers.{index}"
        layer = vit.layers[index]
        expect(layer.attention, modeling_vit.ViTAttention, f"{path}.attention", self.name)
        expect(layer.mlp, modeling_vit.ViTMLP, f"{path}.mlp", self.name)
        attention = layer.attention
        return BlockSites(
            path,
            AttentionSite(
                path=f"{path}.attention",
                norm=f"{path}.layernorm_before",
                dim=attention.q_proj.in_features,
                heads=attention.num_attention_heads,
                head_width=attention.head_dim,
                prefix_tokens=1,
                grid=grid,
                keys=1 + grid[0] * grid[1],
            ),
            FFNSite(f"{path}.mlp.fc1", f"{path}.mlp.fc2", layer.mlp.fc1.out_features),
        )

    def _patch_size(self, host: nn.Module) -> tuple[int, int]:
        return _pair(cast(ViTForImageClassification, host).config.patch_size)

    def input_size(self, host: nn.Module) -> tuple[int, int, int]:
        """Return (channels, height, width) of the images that the host takes."""
        config = cast(ViTForImageClassification, host).config
        return (config.num_channels, *_pair(config.image_size))

    def track_grids(self, host: nn.Module, blocks: Sequence[int], whole: bool) -> dict[int, Grid]:
        """Return the one grid of all blocks, kept at the size of the images, which `interpolate_pos_encoding` frees."""
        grid = Grid(*self._grid(host))
        if blocks:
            embeddings: Any = cast(ViTForImageClassification, host).vit.embeddings
            tracker = GridTracker(grid, self._patch_size(host), pads=False)
            embeddings.patch_embeddings.register_forward_pre_hook(tracker)
        return dict.fromkeys(blocks, grid)

    def _grid(self, host: nn.Module) -> tuple[int, int]:
        patch = self._patch_size(host)
        _, height, width = self.input_size(host)
        return (height // patch[0], width // patch[1])

    def source(self, host: nn.Module) -> dict[str, Any]:
        """Return the host's configuration."""
        config = cast(ViTForImageClassification, host).config
        return {"library": "transformers", "config": config.to_diff_dict(), "attention": config._attn_implementation}

    def build(self, source: dict[str, Any]) -> nn.Module:
        """Make a model from its configuration."""
        config = ViTConfig.from_dict(source["config"], attn_implementation=source["attention"])
        return ViTForImageClassification(config)


def _pair(size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


FAMILY = HuggingFaceViT()
