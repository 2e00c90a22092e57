"""The golden files (shared/golden): what the published implementation computed, and its gated layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

import reference
from layers import site_of
from spvit.hosts.grid import Grid
from spvit.search.gated_attention import GatedAttention

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden files are not at {GOLDEN}")
DIM, HEADS, GRID, PREFIX = 48, 3, (5, 5), 1


def golden(name: str) -> dict[str, Tensor]:
    """Return the tensors of a golden file."""
    from safetensors.torch import load_file

    return load_file(GOLDEN / f"{name}.safetensors")


def load_batchnorm(bn: nn.BatchNorm2d, tensors: dict[str, Tensor], name: str) -> None:
    """Copy a batch norm of a golden file."""
    for part in ("weight", "bias", "running_mean", "running_var"):
        getattr(bn, part).data.copy_(tensors[f"w.{name}.{part}"])


@torch.no_grad()
def make_layer(deit: dict[str, Tensor]) -> GatedAttention:
    """Return the gated layer of `deit_attention` as it was before any training pass."""
    attention = Attention(DIM, HEADS, qkv_bias=True)
    for part in ("weight", "bias"):
        getattr(attention.qkv, part).copy_(torch.cat([deit[f"w.qk.{part}"], deit[f"w.v.{part}"]]))
        getattr(attention.proj, part).copy_(deit[f"w.proj.{part}"])
    site = site_of("timm", PREFIX, DIM, HEADS, GRID)
    layer = GatedAttention(attention, site, Grid(*GRID), deit["w.alpha"].item())
    layer.head_logits.copy_(deit["w.head_probs"])
    load_batchnorm(layer.bn1, deit, "bn_1x1")
    load_batchnorm(layer.bn3, deit, "bn_3x3")

    # The file's running statistics are those *after* one training pass (the writer stored the live buffers, and the
    # evaluation outputs were computed before): stored = 0.9 earlier + 0.1 batch statistic. A training pass of the naive
    # reference from earlier = 0 leaves 0.1 batch statistic, which gives the earlier ones back.
    for bn, positions in ((layer.bn1, [4]), (layer.bn3, list(range(9)))):
        stored = [bn.running_mean.clone(), bn.running_var.clone()]
        bn.running_mean.zero_()
        bn.running_var.zero_()
        reference.bottleneck(deit["x"], layer, bn, positions, training=True)
        for buffer, value in zip((bn.running_mean, bn.running_var), stored):
            buffer.copy_((value - buffer) / 0.9)
    return layer
