"""Gated attention layers alone, with tokens of a small grid, for tests that look at one layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spvit.hosts.calling import answer_as_tuple
from spvit.hosts.grid import Grid
from spvit.hosts.sites import AttentionSite, Rows
from spvit.search.gated_attention import GatedAttention
from tiny import randomise

DIM, HEADS, GRID = 24, 3, (3, 4)
DOUBLE = torch.float64


def make_attention(library: str, bias: bool) -> nn.Module:
    """Return a dense attention layer of a library."""
    if library == "timm":
        from timm.models.vision_transformer import Attention

        return Attention(DIM, HEADS, qkv_bias=bias, proj_bias=bias)
    vit = pytest.importorskip("transformers.models.vit.modeling_vit")
    config = vit.ViTConfig(hidden_size=DIM, num_attention_heads=HEADS, qkv_bias=bias, attn_implementation="sdpa")
    return vit.ViTAttention(config)


def site_of(
    library: str = "timm",
    prefix_tokens: int = 1,
    dim: int = DIM,
    heads: int = HEADS,
    grid: tuple[int, int] = GRID,
    bias: bool = True,
) -> AttentionSite:
    """Return the site of a lone layer."""
    projections = {
        "timm": [("qkv", 0), ("qkv", dim), ("qkv", 2 * dim), ("proj", 0)],
        "huggingface": [(f"{name}_proj", 0) for name in "qkvo"],
    }
    rows = [
        Rows(f"{linear}.weight", f"{linear}.bias" if bias or linear == "o_proj" else None, start)
        for linear, start in projections[library]
    ]
    return AttentionSite(
        path="",
        norm=None,
        **dict(zip(("query", "key", "value", "out"), rows)),
        dim=dim,
        heads=heads,
        head_width=dim // heads,
        prefix_tokens=prefix_tokens,
        grid=grid,
        keys=prefix_tokens + grid[0] * grid[1],
        narrows_queries=True,
        narrows_values=True,
        scale=(dim // heads) ** -0.5,
        tuple_items=2 if library == "huggingface" else 0,
    )


def gate(attention: nn.Module, library: str = "timm", prefix_tokens: int = 1) -> GatedAttention:
    """Return a gated layer around a dense one, as it starts."""
    biased = any(name.endswith(("qkv.bias", "q_proj.bias")) for name, _ in attention.named_parameters())
    layer = GatedAttention(attention, site_of(library, prefix_tokens, bias=biased), Grid(*GRID), 0.01)
    if library == "huggingface":
        layer.register_forward_hook(partial(answer_as_tuple, items=2))
    return layer


def make_layer(library: str = "timm", bias: bool = True, prefix_tokens: int = 1) -> GatedAttention:
    """Return a randomised gated attention layer in training mode, in double precision."""
    return randomise(gate(make_attention(library, bias), library, prefix_tokens)).to(DOUBLE).train()


def tokens(prefix_tokens: int = 1, batch: int = 2) -> Tensor:
    """Return random normalised tokens that need a gradient."""
    generator = torch.Generator().manual_seed(3)
    shape = (batch, prefix_tokens + GRID[0] * GRID[1], DIM)
    return torch.randn(shape, generator=generator, dtype=DOUBLE).requires_grad_()


def observe(layer: nn.Module, x: Tensor, *args: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return output, gradients (of x too) and buffers after a forward and backward pass."""
    out = layer(x, *args)
    out = out[0] if isinstance(out, tuple) else out
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=DOUBLE)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers() if "num_batches" not in name}
    return out.detach(), {"x": x.grad, **gradients}, buffers
