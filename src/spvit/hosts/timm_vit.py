"""timm's VisionTransformer: ViT, DeiT with one or two prefix tokens, register tokens, any pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from timm.layers import Attention, Mlp, PatchDropout
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn

from spvit.errors import UnsupportedHostError
from spvit.hosts.base import AttentionSite, BlockSites, FFNSite, GridTracker, expect
from spvit.hosts.timm_models import describe_timm_model, make_timm_model, read_packed_attention
from spvit.kernels import AttentionWeights, Projections
from spvit.pruned import Grid
from spvit.searchable import AttentionAccess


def read_attention(attention: nn.Module) -> AttentionWeights:
    """Return the shared weights of a timm attention layer, whose query, key and value projections are packed."""
    layer = cast(Attention, attention)
    return read_packed_attention(layer.qkv, layer.proj, layer.num_heads)


def read_projections(attention: nn.Module) -> Projections | None:
    """Return all weights of a timm attention layer, or None when it gates its output."""
    layer = cast(Attention, attention)
    if getattr(layer, "gate", None) is not None:
        return None
    split = (3, layer.num_heads, layer.head_dim)
    weight = layer.qkv.weight.unflatten(0, split)
    biases = [None] * 3 if layer.qkv.bias is None else list(layer.qkv.bias.unflatten(0, split))
    norms = (layer.q_norm, layer.k_norm, layer.norm)
    query_norm, key_norm, out_norm = (None if isinstance(norm, nn.Identity) else norm for norm in norms)
    return Projections(
        query_weight=weight[0],
        query_bias=biases[0],
        key_weight=weight[1],
        key_bias=biases[1],
        shared=read_attention(attention),
        scale=layer.scale,
        dropout=layer.attn_drop.p,
        out_dropout=layer.proj_drop.p,
        query_norm=query_norm,
        key_norm=key_norm,
        out_norm=out_norm,
    )


class TimmViT:
    """Adapter of timm's VisionTransformer and VisionTransformerDistilled."""

    name = "timm VisionTransformer"
    temperature = 0.01
    access = AttentionAccess(
        read=read_attention, value_projection="qkv", returns_tuple=False, read_projections=read_projections
    )

    def blocks(self, host: nn.Module) -> tuple[BlockSites, ...]:
        """Return the sites of every block."""
        model = cast(VisionTransformer, host)
        if isinstance(model.patch_drop, PatchDropout):
            raise UnsupportedHostError(
                f"{self.name} with patch_drop_rate > 0 drops patches, which leaves convolutions no grid; "
                "create the model with patch_drop_rate=0"
            )
        embed = model.patch_embed
        if embed.img_size is None:
            raise UnsupportedHostError(
                f"{self.name} without an img_size has no patch grid; create it with img_size=..."
            )
        height, width = embed.dynamic_feat_size(embed.img_size)
        return tuple(self._block(model, index, (height, width)) for index in range(len(model.blocks)))

    def _block(self, model: VisionTransformer, index: int, grid: tuple[int, int]) -> BlockSites:
        path = f"blocks.{index}"
        block = model.blocks[index]
        if type(block) not in (Block, ResPostBlock):
            raise UnsupportedHostError(
                f"{path} is a {type(block).__name__}, but {self.name} hosts are supported with Block and ResPostBlock "
                "there only"
            )
        attention, ffn = cast(Attention, block.attn), cast(Mlp, block.mlp)
        expect(attention, Attention, f"{path}.attn", self.name)
        expect(ffn, Mlp, f"{path}.mlp", self.name)
        for part in ("fc1", "fc2"):
            expect(getattr(ffn, part), nn.Linear, f"{path}.mlp.{part}", self.name)
        if not isinstance(ffn.norm, nn.Identity):
            raise UnsupportedHostError(
                f"{path}.mlp.norm is a {type(ffn.norm).__name__} over the hidden units, which pruning would change; "
                "use a model without scale_mlp_norm"
            )
        prefix_tokens = model.num_prefix_tokens
        return BlockSites(
            path,
            AttentionSite(
                path=f"{path}.attn",
                # In a residual-post-norm block the norm follows the attention, so it must stay.
                norm=f"{path}.norm1" if type(block) is Block else None,
                dim=attention.qkv.in_features,
                heads=attention.num_heads,
                head_width=attention.head_dim,
                prefix_tokens=prefix_tokens,
                grid=grid,
                keys=prefix_tokens + grid[0] * grid[1],
            ),
            FFNSite(f"{path}.mlp.fc1", f"{path}.mlp.fc2", ffn.fc1.out_features),
        )

    def input_size(self, host: nn.Module) -> tuple[int, int, int]:
        """Return (channels, height, width) of the images that the host takes."""
        embed = cast(VisionTransformer, host).patch_embed
        assert embed.img_size is not None
        return (embed.proj.in_channels, embed.img_size[0], embed.img_size[1])

    def track_grids(self, host: nn.Module, blocks: Sequence[int], whole: bool) -> dict[int, Grid]:
        """Return the one grid of all blocks, kept at the size of the images, which `dynamic_img_size` lets differ."""
        embed = cast(VisionTransformer, host).patch_embed
        grid = Grid(*embed.dynamic_feat_size(self.input_size(host)[1:]))
        if blocks:
            patch = (embed.patch_size[0], embed.patch_size[1])
            embed.register_forward_pre_hook(GridTracker(grid, patch, embed.dynamic_img_pad))
        return dict.fromkeys(blocks, grid)

    def source(self, host: nn.Module) -> dict[str, Any]:
        """Return the timm model name and arguments that the host was created with."""
        return describe_timm_model(host)

    def build(self, source: dict[str, Any]) -> nn.Module:
        """Make a timm model from its name and arguments."""
        return make_timm_model(source)


FAMILY = TimmViT()
