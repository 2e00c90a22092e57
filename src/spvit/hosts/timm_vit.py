"""timm's VisionTransformer: ViT, DeiT with one or two prefix tokens, register tokens, any pooling."""

from __future__ import annotations

from timm.layers import HybridEmbed, PatchDropout
from timm.models.vision_transformer import Attention, Block, ResPostBlock, VisionTransformer
from torch import nn

from spvit.errors import UnknownPartError, UnsupportedHostError
from spvit.hosts.sites import AttentionSite, BlockSites
from spvit.hosts.timm_models import TimmFamily, input_size, parts

NAME = "timm VisionTransformer"


def family(vit: VisionTransformer) -> TimmFamily:
    """Return the family of a VisionTransformer or VisionTransformerDistilled."""
    embed = vit.patch_embed
    if isinstance(vit.patch_drop, PatchDropout):
        raise UnsupportedHostError(
            f"{NAME} with patch_drop_rate > 0 drops patches, which leaves convolutions no grid; "
            "create the model with patch_drop_rate=0"
        )
    if isinstance(embed, HybridEmbed):
        raise UnknownPartError(f"patch_embed is a HybridEmbed, but {NAME} hosts cut images into patches")
    if embed.img_size is None:
        raise UnsupportedHostError(f"{NAME} without an img_size has no patch grid; create it with img_size=...")
    grid = embed.dynamic_feat_size(embed.img_size)
    blocks = tuple(_block(vit, f"blocks.{index}", (grid[0], grid[1])) for index in range(len(vit.blocks)))
    return TimmFamily(NAME, blocks, input_size(vit), "patch_embed.proj")


def _block(vit: VisionTransformer, path: str, grid: tuple[int, int]) -> BlockSites:
    cls = type(vit.get_submodule(path))
    if cls not in (Block, ResPostBlock):
        raise UnknownPartError(
            f"{path} is a {cls.__name__}, but {NAME} hosts are supported with Block and ResPostBlock there only"
        )
    shared, ffn = parts(vit, path, Attention, NAME)
    attention = vit.get_submodule(f"{path}.attn")

    def norm(name: str) -> str | None:
        return None if isinstance(getattr(attention, name, nn.Identity()), nn.Identity) else name

    norms = (norm("q_norm"), norm("k_norm"), norm("norm"))
    plain = getattr(attention, "gate", None) is None
    site = AttentionSite(
        **shared,
        # In a residual-post-norm block the norm follows the attention, so it must stay.
        norm=f"{path}.norm1" if cls is Block else None,
        prefix_tokens=vit.num_prefix_tokens,
        grid=grid,
        keys=vit.num_prefix_tokens + grid[0] * grid[1],
        narrows_queries=plain and norms[0] is None,
        narrows_values=plain and norms[2] is None,
        norms=norms,
    )
    return BlockSites(path, site, ffn)
