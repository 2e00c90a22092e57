"""Narrow attention as a module: it computes attention a head at a time, and is called as the layer it replaces."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import reference
from layers import DIM, DOUBLE, HEADS, make_layer, tokens
from spvit.architecture import PUBLISHED, Attention
from spvit.replacements.narrow import REPLACEMENT
from spvit.replacements.narrow_attention import NarrowAttention
from tiny import assert_all_close, assert_close, assert_differ

SHAPES = {
    "heads": Attention(heads=(0, 2)),
    "ranks": Attention(query_key_rank=3, value_rank=5),
    "all": Attention(heads=(1,), query_key_rank=5, value_rank=2),
}


def _narrow(library: str, kept: Attention, bias: bool = True) -> tuple[NarrowAttention, nn.Module]:
    """Return narrow attention in training mode, and the layer it was made from."""
    layer = make_layer(library, bias)
    narrow = REPLACEMENT.make(layer.attention, layer.site, kept, PUBLISHED, layer.grid)
    return narrow.train(), layer.attention


def _by_head(narrow: NarrowAttention) -> SimpleNamespace:
    """Return views of the packed weights by head."""
    sizes = [narrow.heads * narrow.query_key_rank] * 2 + [narrow.heads * narrow.value_rank]
    found = SimpleNamespace(scale=narrow.scale)
    for suffix, packed in (("weight", narrow.qkv.weight), ("bias", narrow.qkv.bias)):
        parts = [None] * 3 if packed is None else packed.split(sizes)
        for name, part in zip(("query", "key", "value"), parts):
            setattr(found, f"{name}_{suffix}", None if part is None else part.unflatten(0, (narrow.heads, -1)))
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("library", ["timm", "huggingface"])
@pytest.mark.parametrize("kept", SHAPES)
def test_narrow_attention_is_attention_a_head_at_a_time(kept: str, library: str, bias: bool, masked: bool) -> None:
    narrow, _ = _narrow(library, SHAPES[kept], bias)
    assert narrow.scale == (DIM // HEADS) ** -0.5  # of the whole layer, whatever the rank
    assert all(parameter.dtype == DOUBLE and parameter.is_leaf for parameter in narrow.parameters())
    generator = torch.Generator().manual_seed(8)
    mask = torch.randn(1, 1, 13, 13, generator=generator, dtype=DOUBLE) if masked else None
    results = []
    for naive in (False, True):
        narrow.zero_grad()
        x = tokens()
        if naive:
            heads = reference.heads_out(x, _by_head(narrow), None if mask is None else mask[0])
            out = heads.flatten(2) @ narrow.proj.weight.T + (0 if narrow.proj.bias is None else narrow.proj.bias)
        else:
            out = narrow(x, mask)
        (out * torch.linspace(-1, 1, out.numel(), dtype=DOUBLE).view_as(out)).sum().backward()
        results.append((out.detach(), x.grad, {name: p.grad for name, p in narrow.named_parameters()}))
    assert_close(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1])
    assert_all_close(results[0][2], results[1][2])


@pytest.mark.parametrize("library", ["timm", "huggingface"])
def test_narrow_attention_takes_the_arguments_of_the_layer_it_replaces(library: str) -> None:
    narrow, layer = _narrow(library, Attention(query_key_rank=DIM // HEADS))  # the whole layer in other words
    layer.eval()
    narrow.eval()
    x = tokens().detach()
    mask = torch.full((1, 1, 13, 13), float("-inf"), dtype=DOUBLE).triu(1)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((x,), {}), ((x, mask), {})]
    if library == "timm":
        calls += [((x,), {"attn_mask": mask, "is_causal": False}), ((x, None, True), {}), ((x,), {"is_causal": True})]
    outputs = []
    for args, options in calls:
        out, expected = narrow(*args, **options), layer(*args, **options)
        out, expected = (out, expected[0]) if library == "huggingface" else (out, expected)
        assert (out - expected).abs().max() < 1e-8
        outputs.append(out)
    assert_differ(outputs[1], outputs[0])


def test_narrow_attention_drops_out_in_training_only() -> None:
    narrow, _ = _narrow("timm", SHAPES["ranks"])
    x = tokens()
    expected = narrow(x)
    for name in ("dropout", "out_drop"):
        twin = copy.deepcopy(narrow)
        twin.dropout, twin.out_drop.p = (0.5, 0.0) if name == "dropout" else (0.0, 0.5)
        assert not torch.equal(twin(x), expected)
        assert torch.equal(twin.eval()(x), expected)


def test_narrow_attention_can_be_copied_pickled_and_printed() -> None:
    narrow, _ = _narrow("timm", SHAPES["all"])
    assert "heads=1, query_key_rank=5, value_rank=2" in repr(narrow)
    assert [type(child) for child in narrow.children()] == [nn.Linear, *[nn.Identity] * 3, nn.Linear, nn.Dropout]
    for twin in (copy.deepcopy(narrow), pickle.loads(pickle.dumps(narrow))):
        assert torch.equal(twin(tokens()), narrow(tokens()))
    assert [part.shape for part in (narrow.qkv.weight, narrow.proj.weight)] == [(12, DIM), (DIM, 2)]
