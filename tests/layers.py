"""Gated attention layers alone, with tokens of a small grid, for tests that look at one layer."""

from __future__ import annotations

import pytest
import torch
from spvit.pruned import Grid
from spvit.search.gated_attention import GatedAttention
from torch import Tensor, nn

from spvit.hosts.recognise import family_of_library
from tiny import randomise

DIM, HEADS, GRID = 24, 3, (3, 4)
DOUBLE = torch.float64


def make_attention(library: str, bias: bool) -> nn.Module:
    """Return a dense attention layer of a library."""
    if library == "timm":
        from timm.layers import Attention

        return Attention(DIM, HEADS, qkv_bias=bias, proj_bias=bias)
    vit = pytest.importorskip("transformers.models.vit.modeling_vit")
    config = vit.ViTConfig(hidden_size=DIM, num_attention_heads=HEADS, qkv_bias=bias, attn_implementation="sdpa")
    return vit.ViTAttention(config)


def gate(attention: nn.Module, library: str = "timm", prefix_tokens: int = 1) -> GatedAttention:
    """Return a gated layer around a dense one, as it starts."""
    return GatedAttention(
        attention,
        family_of_library({"timm": "timm", "huggingface": "transformers"}[library]).access,
        prefix_tokens=prefix_tokens,
        grid=Grid(*GRID),
        temperature=0.01,
    )


def make_layer(library: str = "timm", bias: bool = True, prefix_tokens: int = 1) -> GatedAttention:
    """Return a randomised gated attention layer in training mode, in double precision."""
    return randomise(gate(make_attention(library, bias), library, prefix_tokens)).to(DOUBLE).train()


def tokens(prefix_tokens: int = 1, batch: int = 2) -> Tensor:
    """Return random normalised tokens that need a gradient."""
    generator = torch.Generator().manual_seed(3)
    shape = (batch, prefix_tokens + GRID[0] * GRID[1], DIM)
    return torch.randn(shape, generator=generator, dtype=DOUBLE).requires_grad_()
