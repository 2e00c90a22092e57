"""Costs: the published figures, counting, and expectations of gates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import reference
import spvit
from spvit.architecture import FFN, KINDS, Architecture, Attention, Block
from spvit.cost import AttentionCost, BlockCost, NetworkCost, count_macs, count_params
from spvit.hosts.host import Host
from spvit.replacements.costs import network_costs
from spvit.search.gates import expected
from tiny import assert_close, images, make_host


def _block(*kinds: int, unit: int, units: int) -> BlockCost:
    return BlockCost(dict(zip(KINDS, map(AttentionCost, (*kinds, 0)))), unit, units)


COST = NetworkCost("macs", 1000, (_block(400, 300, 60, unit=2, units=50), _block(500, 310, 70, unit=3, units=40)))
NESTED_GATES = {"msa": (1, 1, 1), "conv3": (1, 1, 0), "conv1": (1, 0, 0), "skip": (0, 0, 0)}


def test_counting_leaves_the_model_alone() -> None:
    host = make_host("class_token").train()
    before = {key: value.clone() for key, value in host.state_dict().items()}
    x = images(host)
    count_macs(host, lambda twin: twin(x.to("meta")))
    assert host.training
    assert all(torch.equal(value, before[key]) for key, value in host.state_dict().items())
    assert all(parameter.requires_grad for parameter in host.parameters())


# method.md section 6: parameters and MACs of the published architectures, to the digits that it prints.
PUBLISHED = {
    "spvit_deit_tiny_patch16_224": ("deit_tiny_patch16_224", "4.775M", "1.0386G"),
    "spvit_deit_small_patch16_224": ("deit_small_patch16_224", "15.871M", "3.3532G"),
    "spvit_deit_base_patch16_224": ("deit_base_patch16_224", "41.584M", "8.4091G"),
    "spvit_deit_base_11g_patch16_224": ("deit_base_patch16_224", "58.321M", "11.764G"),
    "spvit_swin_tiny_patch4_window7_224": ("swin_tiny_patch4_window7_224", "26.232M", "3.3304G"),
    "spvit_swin_small_patch4_window7_224": ("swin_small_patch4_window7_224", "38.922M", "6.1376G"),
    "spvit_swin_base_patch4_window7_224": ("swin_base_patch4_window7_224", "67.542M", "11.385G"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architectures_cost_what_the_method_says(name: str) -> None:
    timm = pytest.importorskip("timm")
    host_name, params, macs = PUBLISHED[name]
    architecture = spvit.architectures()[name]
    with torch.device("meta"):
        host = timm.create_model(host_name)
    costs = network_costs(host)
    kinds, sites = architecture.kinds(), Host.of(host).blocks
    # The printed parameters count each convolution's batch norm (a scale and a shift a channel), which folding removes.
    norms = sum(2 * site.attention.head_width for site, kind in zip(sites, kinds) if kind.startswith("conv"))
    found = {"params": costs["params"].of(architecture) + norms, "macs": costs["macs"].of(architecture)}
    for metric, printed in (("params", params), ("macs", macs)):
        digits = len(printed.partition(".")[2]) - 1
        assert f"{found[metric] / {'M': 1e6, 'G': 1e9}[printed[-1]]:.{digits}f}{printed[-1]}" == printed
    pruned = spvit.prune(host, architecture)
    assert count_params(pruned) == found["params"]
    assert count_params(spvit.fold(pruned)) == costs["params"].of(architecture)
    folded = f"{costs['params'].of(architecture) / 1e6:.3f}M"
    without_norms = {"spvit_deit_base_patch16_224": "41.583M", "spvit_deit_base_11g_patch16_224": "58.320M"}
    assert folded == without_norms.get(name, params)
    # The figures of Swin-S and -B hold only where a skipped layer keeps its norm, as the publication has it.
    zero = f"{costs['params'].of(replace(architecture, skip_rule='zero')) / 1e6:.3f}M"
    dropped = {"spvit_swin_small_patch4_window7_224": "38.920M", "spvit_swin_base_patch4_window7_224": "67.539M"}
    assert zero == dropped.get(name, folded)


def test_numbers_and_tensors_take_the_same_arithmetic() -> None:
    for first in KINDS:
        for second in KINDS:
            architecture = Architecture(
                (Block(Attention(first), FFN(50, (1, 2, 9))), Block(Attention(second), FFN(40, (0,))))
            )
            exact = COST.of(architecture)
            assert (
                exact == 1000 + COST.blocks[0].kinds[first].whole + COST.blocks[1].kinds[second].whole + 3 * 2 + 1 * 3
            )
            attention = torch.tensor([NESTED_GATES[first], NESTED_GATES[second]], dtype=torch.float64)
            assert COST.expected(attention, [torch.tensor(3.0), torch.tensor(1.0)]).item() == exact
    assert COST.dense == 1000 + 400 + 500 + 2 * 50 + 3 * 40


def test_expected_cost_learns_as_the_method_says() -> None:
    cost = replace(COST, blocks=(COST.blocks[0],) * 3)
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(3, 3, generator=generator), torch.randn(3, 50, generator=generator)]
    results = []
    for naive in (False, True):
        attention, ffn = (leaf.double().requires_grad_() for leaf in leaves)
        if naive:
            value = reference.expected_cost(list(attention), list(ffn), cost.fixed, 400, 300, 60, 2)
        else:
            value = cost.expected(torch.cumprod(expected(attention), -1), [expected(row).sum() for row in ffn])
        value.backward()
        results.append((value.detach(), attention.grad, ffn.grad))
    for own, naive_result in zip(*results):
        assert_close(own, naive_result)
    assert (results[0][1] != 0).any()


def test_count_params_counts_all() -> None:
    assert count_params(nn.Linear(3, 4).requires_grad_(False)) == 16
