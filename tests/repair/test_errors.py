"""Errors of narrower attention against repaired layers themselves: one is pruned, repaired and run for every choice."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import spvit
from spvit import moments
from spvit.architecture import FFN, Architecture, Attention, Block
from spvit.hosts.host import Host
from spvit.hosts.walk import BlockPair, advance, evaluating, first_inputs, reached
from spvit.repair.errors import attention_errors, paired_ranks
from spvit.repair.repair import repair_block
from spvit.replacements.install import installed
from tiny import images, make_host

UNITS = 72
RANKS = (2, 5)


@pytest.fixture(autouse=True)
def _no_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors as ranked have the ridge's penalty in them, which repaired layers do not show."""
    monkeypatch.setattr(moments, "RIDGE", 1e-9)


def pair_of(host: Host, model: nn.Module, x: Tensor) -> BlockPair:
    """Return the second block of a host beside a copy of it."""
    inputs = first_inputs(host, [x])
    advance(host, 0, inputs)
    return BlockPair(model, host, 1, inputs, inputs)


def metric_of(model: nn.Module) -> Tensor:
    """Return a metric in which outputs count very differently."""
    dim = Host.of(model).blocks[1].attention.dim
    return torch.randn(dim, dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64).square()


def errors_of(model: nn.Module, x: Tensor) -> dict[Attention, float]:
    """Return the errors of the second block's attention."""
    host = Host.of(model)
    with evaluating(model):
        return attention_errors(pair_of(host, model, x), RANKS, metric_of(model))


def repaired_error(model: nn.Module, x: Tensor, kept: Attention) -> float:
    """Put one narrower layer in place, repair it, and compare its outputs with the dense layer's."""
    host, block = Host.of(model), Block(kept, FFN.whole(UNITS))
    twin = host.on(copy.deepcopy(model))
    with evaluating(model), installed(twin, 1, block):
        pair = pair_of(host, twin.model, x)
        repair_block(pair, block)
        path = pair.sites.attention.path
        layer = twin.model.get_submodule(path)
        own = twin.model.get_submodule(pair.sites.path)
        found = reached(own, pair.inputs[0], layer, output=True)
        (wanted,) = pair.wanted(path)
    return float(((found - wanted) @ metric_of(model).T).square().sum(-1).mean())


@pytest.mark.parametrize(
    "name", ["class_token", pytest.param("huggingface", marks=pytest.mark.slow), "no_biases", "average_pooling"]
)
def test_errors_are_those_of_repaired_layers(name: str) -> None:
    host = make_host(name)
    x = images(host, 24)
    errors = errors_of(host, x)
    heads = Host.of(host).blocks[1].attention.heads
    assert len(errors) == heads * (len(RANKS) + 1) ** 2 - 1
    for kept, error in errors.items():
        assert error == pytest.approx(repaired_error(host, x, kept), rel=1e-3, abs=1e-5), kept


def test_the_head_given_up_is_the_one_that_the_others_repair_best() -> None:
    host = make_host("class_token")
    x = images(host, 24)
    two = next(kept for kept in errors_of(host, x) if kept.heads and len(kept.heads) == 2)
    pairs = [Attention(heads=heads) for heads in ((0, 1), (0, 2), (1, 2))]
    found = {kept: repaired_error(host, x, kept) for kept in pairs}
    assert Attention(heads=two.heads) == min(pairs, key=found.__getitem__)


def test_norms_forbid_what_they_are_over() -> None:
    host = make_host("options")  # normalises queries and keys of a head, and the outputs of all
    assert errors_of(host, images(host, 24)) == {}
    host.blocks[1].attn.norm = nn.Identity()
    found = errors_of(host, images(host, 24))
    assert {kept.query_key_rank for kept in found} == {None}
    assert {kept.value_rank for kept in found} == {*RANKS, None}
    host = make_host("options")
    host.blocks[1].attn.q_norm = host.blocks[1].attn.k_norm = nn.Identity()
    found = errors_of(host, images(host, 24))
    assert [(kept.heads, kept.query_key_rank, kept.value_rank) for kept in found] == [(None, 2, None), (None, 5, None)]


@pytest.mark.parametrize("name", ["class_token", "huggingface"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_unequal_ranks_attend_as_equal_ones_with_zeros(name: str, dtype: torch.dtype) -> None:
    """The CPU's fused attention wants equal widths; the formula does not."""
    host = make_host(name, dtype)
    kept = Attention("msa", (0, 2), 3, 5)
    blocks = [Block(kept, FFN.whole(UNITS))] * 4
    model = spvit.prune(host, Architecture(tuple(blocks)), repair=images(host, 16)).eval()
    layer: nn.Module = model.get_submodule(Host.of(host).blocks[0].attention.path)
    x = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        projected = layer.qkv(x)
        query, key, value = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in projected.split([6, 6, 10], dim=2))
        logits = query @ key.transpose(-2, -1) * layer.scale
        expected = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
        found = layer.heads_out(x)
    assert found.shape == (2, 17, 10)
    assert math.isclose(float((found - expected).abs().max()), 0, abs_tol=1e-5 if dtype == torch.float32 else 1e-12)


def test_pairs_are_of_few_evenly_spread_ranks() -> None:
    assert paired_ranks(range(8, 64, 8)) == [8, 16, 24, 32, 40, 48, 56]
    assert paired_ranks(range(1, 64)) == [9, 18, 27, 36, 45, 54, 63]
    assert paired_ranks(range(4, 40, 4)) == [8, 12, 16, 24, 28, 32, 36]
    assert paired_ranks([]) == []
