"""timm's VisionTransformer: ViT, DeiT with one or two prefix tokens, register tokens, any pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from timm.layers import Attention, HybridEmbed, PatchDropout
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn

from spvit.errors import UnknownPartError, UnsupportedHostError
from spvit.hosts.grid import Grid, GridTracker
from spvit.hosts.sites import AttentionSite, BlockSites, Undo
from spvit.hosts.timm_models import TimmFamily


class _TimmViT(TimmFamily):
    """Adapter of timm's VisionTransformer and VisionTransformerDistilled."""

    name = "timm VisionTransformer"
    temperature = 0.01

    def blocks(self, model: nn.Module) -> tuple[BlockSites, ...]:
        vit = cast(VisionTransformer, model)
        if isinstance(vit.patch_drop, PatchDropout):
            raise UnsupportedHostError(
                f"{self.name} with patch_drop_rate > 0 drops patches, which leaves convolutions no grid; "
                "create the model with patch_drop_rate=0"
            )
        embed = vit.patch_embed
        if isinstance(embed, HybridEmbed):
            raise UnknownPartError(f"patch_embed is a HybridEmbed, but {self.name} hosts cut images into patches")
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
            raise UnknownPartError(
                f"{path} is a {type(block).__name__}, but {self.name} hosts are supported with Block and ResPostBlock "
                "there only"
            )
        self.expect_parts(vit, path, Attention)
        attention = cast(Attention, block.attn)

        def norm(name: str) -> str | None:
            return None if isinstance(getattr(attention, name), nn.Identity) else name

        norms = (norm("q_norm"), norm("k_norm"), norm("norm"))
        plain = getattr(attention, "gate", None) is None
        shared, ffn = self.parts(vit, path, attention.num_heads, attention.head_dim)
        prefix_tokens = vit.num_prefix_tokens
        return BlockSites(
            path,
            AttentionSite(
                **shared,
                # In a residual-post-norm block the norm follows the attention, so it must stay.
                norm=f"{path}.norm1" if type(block) is Block else None,
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
            ffn,
        )

    def watch_grids(self, model: nn.Module, blocks: Sequence[int]) -> tuple[dict[int, Grid], list[Undo]]:
        """Return the one grid of all blocks, kept at the size of the images, which `dynamic_img_size` lets differ."""
        embed = cast(VisionTransformer, model).patch_embed
        grid = Grid(*embed.dynamic_feat_size(embed.img_size))
        if not blocks:
            return {}, []
        patch = (embed.patch_size[0], embed.patch_size[1])
        handle = embed.register_forward_pre_hook(GridTracker(grid, patch, embed.dynamic_img_pad))
        return dict.fromkeys(blocks, grid), [handle.remove]

    whole_grids = watch_grids


FAMILY = _TimmViT()
