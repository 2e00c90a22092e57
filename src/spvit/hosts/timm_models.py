"""What the families of timm share: parts of their blocks, and what their models say of themselves."""

from __future__ import annotations

from typing import Any

from timm.layers import Mlp
from torch import nn

from spvit.errors import UnknownPartError
from spvit.hosts.family import Family
from spvit.hosts.sites import FFNSite, Rows, UnitRows, expect


class TimmFamily(Family):
    """A family whose models say what they take and answer now."""

    def input_size(self, model: Any) -> tuple[int, int, int]:
        """Return (channels, height, width) of the images that the model takes now."""
        return input_size(model)

    def classes(self, model: Any) -> int:
        """Return how many classes its head tells apart now."""
        return int(model.num_classes)


def input_size(model: Any) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that a model takes."""
    embed = model.patch_embed
    return (embed.proj.in_channels, embed.img_size[0], embed.img_size[1])


def parts(model: nn.Module, path: str, attention: type, family: str) -> tuple[dict[str, Any], FFNSite]:
    """Return what all attention sites of timm say alike, and the site of the FFN, of a block at a dotted name.

    Raises UnknownPartError unless its attention and FFN are timm's own, without norms on its units.
    """
    expect(model, f"{path}.attn", attention, family)
    expect(model, f"{path}.mlp", Mlp, family)
    for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        expect(model, f"{path}.{part}", nn.Linear, family)
    block: Any = model.get_submodule(path)
    if not isinstance(block.mlp.norm, nn.Identity):
        raise UnknownPartError(
            f"{path}.mlp.norm is a {type(block.mlp.norm).__name__} over the hidden units, which pruning would change; "
            "use a model without a norm there (scale_mlp_norm)"
        )
    rows, heads = block.attn.proj.in_features, block.attn.num_heads
    shared = {
        "path": f"{path}.attn",
        "query": Rows.of("qkv", block.attn),
        "key": Rows.of("qkv", block.attn, rows),
        "value": Rows.of("qkv", block.attn, 2 * rows),
        "out": Rows.of("proj", block.attn),
        "dim": block.attn.qkv.in_features,
        "heads": heads,
        "head_width": rows // heads,
        "scale": block.attn.scale,
        "dropout": block.attn.attn_drop.p,
        "out_dropout": block.attn.proj_drop.p,
    }
    return shared, FFNSite((UnitRows(f"{path}.mlp.fc1"),), f"{path}.mlp.fc2", block.mlp.fc1.out_features)
