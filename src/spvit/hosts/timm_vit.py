"""timm's VisionTransformer: ViT, DeiT with one or two prefix tokens, register tokens, any pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from timm.layers import Attention, HybridEmbed, Mlp, PatchDropout
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn

from spvit.errors import UnsupportedHostError
from spvit.hosts.grid import Grid, GridTracker
from spvit.hosts.sites import AttentionSite, BlockSites, FFNSite, Undo, expect, expect_linear
from spvit.hosts.timm_models import describe_timm_model, make_timm_model, packed


class TimmViT:
    """Adapter of timm's VisionTransformer and VisionTransformerDistilled."""

    name = "timm VisionTransformer"
    temperature = 0.01

    def blocks(self, model: nn.Module) -> tuple[BlockSites, ...]:
        """Return the sites of every block."""
        vit = cast(VisionTransformer, model)
        if isinstance(vit.patch_drop, PatchDropout):
            raise UnsupportedHostError(
                f"{self.name} with patch_drop_rate > 0 drops patches, which leaves convolutions no grid; "
                "create the model with patch_drop_rate=0"
            )
        embed = vit.patch_embed
        if isinstance(embed, HybridEmbed):
            raise UnsupportedHostError(
                f"{self.name} with a CNN stem (patch_embed is a HybridEmbed) is not supported; use a model that cuts "
                "images into patches itself"
            )
        if embed.img_size is None:
            raise UnsupportedHostError(
                f"{self.name} without an img_size has no patch grid; create it with img_size=..."
            )
        grid = embed.dynamic_feat_size(embed.img_size)
        return tuple(self._block(vit, index, grid) for index in range(len(vit.blocks)))

    def _block(self, vit: VisionTransformer, index: int, grid: tuple[int, int]) -> BlockSites:
        path = f"blocks.{index}"
        block = vit.blocks[index]
        if type(block) not in (Block, ResPostBlock):
            raise UnsupportedHostError(
                f"{path} is a {type(block).__name__}, but {self.name} hosts are supported with Block and ResPostBlock "
                "there only"
            )
        expect(block.attn, Attention, f"{path}.attn", self.name)
        expect(block.mlp, Mlp, f"{path}.mlp", self.name)
        attention, ffn = cast(Attention, block.attn), cast(Mlp, block.mlp)
        expect_linear(vit, [f"{path}.{part}" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")], self.name)
        if not isinstance(ffn.norm, nn.Identity):
            raise UnsupportedHostError(
                f"{path}.mlp.norm is a {type(ffn.norm).__name__} over the hidden units, which pruning would change; "
                "use a model without scale_mlp_norm"
            )

        def norm(name: str) -> str | None:
            return None if isinstance(getattr(attention, name), nn.Identity) else name

        norms = (norm("q_norm"), norm("k_norm"), norm("norm"))
        plain = getattr(attention, "gate", None) is None
        query, key, value = packed(attention.num_heads, attention.head_dim)
        prefix_tokens = vit.num_prefix_tokens
        return BlockSites(
            path,
            AttentionSite(
                path=f"{path}.attn",
                # In a residual-post-norm block the norm follows the attention, so it must stay.
                norm=f"{path}.norm1" if type(block) is Block else None,
                query=query,
                key=key,
                value=value,
                out="proj",
                dim=attention.qkv.in_features,
                heads=attention.num_heads,
                head_width=attention.head_dim,
                prefix_tokens=prefix_tokens,
                grid=(grid[0], grid[1]),
                keys=prefix_tokens + grid[0] * grid[1],
                narrows_queries=plain and norms[0] is None,
                narrows_values=plain and norms[2] is None,
                scale=attention.scale,
                dropout=attention.attn_drop.p,
                out_dropout=attention.proj_drop.p,
                norms=norms,
            ),
            FFNSite(f"{path}.mlp.fc1", f"{path}.mlp.fc2", ffn.fc1.out_features),
        )

    def input_size(self, model: nn.Module) -> tuple[int, int, int]:
        """Return (channels, height, width) of the images that the model takes."""
        embed = cast(VisionTransformer, model).patch_embed
        assert embed.img_size is not None
        return (embed.proj.in_channels, embed.img_size[0], embed.img_size[1])

    def classes(self, model: nn.Module) -> int:
        """Return how many classes the head tells apart; 0 when the model has no head."""
        return cast(VisionTransformer, model).num_classes

    def watch_grids(self, model: nn.Module, blocks: Sequence[int]) -> tuple[dict[int, Grid], list[Undo]]:
        """Return the one grid of all blocks, kept at the size of the images, which `dynamic_img_size` lets differ."""
        embed = cast(VisionTransformer, model).patch_embed
        grid = Grid(*embed.dynamic_feat_size(self.input_size(model)[1:]))
        if not blocks:
            return {}, []
        patch = (embed.patch_size[0], embed.patch_size[1])
        handle = embed.register_forward_pre_hook(GridTracker(grid, patch, embed.dynamic_img_pad))
        return dict.fromkeys(blocks, grid), [handle.remove]

    whole_grids = watch_grids

    def source(self, model: nn.Module) -> dict[str, Any]:
        """Return the timm model name and arguments that the model was created with."""
        return describe_timm_model(model)

    def build(self, source: dict[str, Any]) -> nn.Module:
        """Make a timm model from its name and arguments."""
        return make_timm_model(source)


FAMILY = TimmViT()
