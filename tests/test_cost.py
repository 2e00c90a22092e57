"""Costs: predicted MACs and parameters equal measured ones, the published figures, expectations, and budgets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import reference
import spvit
from spvit.architecture import FFN, KINDS, PREFIX_RULES, SKIP_RULES, Architecture, Attention, Block
from spvit.budget import Budget, human
from spvit.cost import BlockCost, NetworkCost, count_macs, count_params
from spvit.errors import BudgetError
from spvit.hosts.host import Host
from spvit.replacements.costs import network_costs
from spvit.search.gates import expected
from tiny import MIXED, assert_close, images, make_host

COST = NetworkCost("macs", 1000, (BlockCost(400, 300, 60, 2, 50), BlockCost(500, 310, 70, 3, 40)))
NESTED_GATES = {"msa": (1, 1, 1), "conv3": (1, 1, 0), "conv1": (1, 0, 0), "skip": (0, 0, 0)}
UNITS = {"few": (0, 5, 70), "some": tuple(range(1, 72, 2)), "none": (), "all": tuple(range(72))}


def _architecture(
    kinds: tuple[str, ...], units: tuple[tuple[int, ...], ...], widths: tuple[int, ...] = (72,) * 4
) -> Architecture:
    ffns = [FFN(width, kept if len(kept) < 72 else tuple(range(width))) for kept, width in zip(units, widths)]
    return Architecture(tuple(Block(Attention(kind), ffn) for kind, ffn in zip(kinds, ffns)))


def test_predicted_params_hold_under_the_published_skip_rule() -> None:
    host = make_host("class_token", torch.float32)
    architecture = replace(_architecture(MIXED, tuple(UNITS.values())), skip_rule="normalised_input")
    small = spvit.fold(spvit.prune(host, architecture))
    assert network_costs(host)["params"].of(architecture) == count_params(small)


@pytest.mark.parametrize("prefix_rule", PREFIX_RULES)
@pytest.mark.parametrize("skip_rule", SKIP_RULES)
@pytest.mark.parametrize("name", ["registers", "average_pooling", "residual_post_norm"])
def test_predicted_costs_hold_under_every_rule(name: str, skip_rule: str, prefix_rule: str) -> None:
    host = make_host(name, torch.float32)
    kinds = ("skip", "conv1", "conv3", "skip")
    architecture = replace(_architecture(kinds, tuple(UNITS.values())), prefix_rule=prefix_rule, skip_rule=skip_rule)
    small = spvit.fold(spvit.prune(host, architecture))
    costs, x = network_costs(host), images(host, batch=1)
    assert costs["macs"].of(architecture) == count_macs(small, lambda twin: twin(x.to("meta")))
    assert costs["params"].of(architecture) == count_params(small)


def test_all_heads_and_dimensions_cost_as_much_as_the_whole_layer() -> None:
    host = make_host("huggingface_options", torch.float32)
    for cost in network_costs(host).values():
        for kept in (Attention(heads=(0, 1, 2)), Attention(query_key_rank=16, value_rank=16), Attention()):
            assert cost.blocks[0].attention_kept(kept, "linear", "mean") == cost.blocks[0].msa


def test_costs_are_the_formulas_of_the_method() -> None:
    host = make_host("class_token", torch.float32)
    costs = network_costs(host)["macs"]
    n, grid, d, e = 17, 16, 24, 8
    dimension = n * (2 * d + n)  # of one head: two projections, one of the two attention products
    block = BlockCost(
        4 * n * d**2 + 2 * d * n**2,
        10 * d * e * grid,
        2 * d * e * grid,
        2 * n * d,
        72,
        heads=3,
        head_width=e,
        query_key=dimension,
        value=dimension,
        prefix_rules={"linear": 2 * d * e},
    )
    assert costs.blocks == (block,) * 4
    assert costs.fixed == grid * 768 * d + d * 7  # patch embedding and classifier


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
            assert exact == 1000 + COST.blocks[0].attention(first) + COST.blocks[1].attention(second) + 3 * 2 + 1 * 3
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


@pytest.mark.parametrize(
    ("stated", "metric", "fraction", "amount"),
    [
        ({"macs": "50%"}, "macs", 0.5, None),
        ({"params": "12.5 %"}, "params", 0.125, None),
        ({"macs": "100%"}, "macs", 1.0, None),
        ({"macs": " .5% "}, "macs", 0.005, None),
        ({"macs": "1.0G"}, "macs", None, 10**9),
        ({"macs": "300M"}, "macs", None, 300 * 10**6),
        ({"params": "4k"}, "params", None, 4000),
        ({"params": "4K"}, "params", None, 4000),
        ({"macs": "1.5T"}, "macs", None, 15 * 10**11),
        ({"macs": "1234567"}, "macs", None, 1234567),
        ({"macs": 1234567}, "macs", None, 1234567),
        # Binary fractions make 8.3 * 10**9 a little less than it should be.
        ({"macs": "8.3G"}, "macs", None, 8_300_000_000),
        ({"macs": "4.1G"}, "macs", None, 4_100_000_000),
        ({"params": "16.1M"}, "params", None, 16_100_000),
        ({"params": "2.01k"}, "params", None, 2_010),
        ({"params": "0.067G"}, "params", None, 67_000_000),
    ],
)
def test_budgets_that_can_be_stated(stated: dict[str, Any], metric: str, fraction: float, amount: int) -> None:
    assert Budget.parse(**stated) == Budget(metric, fraction, amount)


WORDS = ["", "half", "50 percent", "-5%", "1e9", "1.0g", "1,000", "1.0GG", "%", "1.", "5 0%", "inf", "nan"]
FRACTIONS = ["0", "1.5", "0.0001k"]
OTHER_TYPES = [0, -3, 0.5, True, b"50%", ("50%",)]


@pytest.mark.parametrize("value", [*WORDS, *FRACTIONS, *OTHER_TYPES])
def test_malformed_budgets_are_refused(value: Any) -> None:
    with pytest.raises(BudgetError, match=r'macs budget .* is malformed, expected a share like "50%", an amount like'):
        Budget.parse(macs=value)


@pytest.mark.parametrize("value", ["0%", "0.0%", "101%", "1000%"])
def test_shares_out_of_range_are_refused(value: str) -> None:
    with pytest.raises(BudgetError, match=f"params budget '{value}' is out of range, expected above 0% and at most"):
        Budget.parse(params=value)


def test_a_budget_is_exactly_one_metric() -> None:
    with pytest.raises(BudgetError, match="one of macs or params, found neither"):
        Budget.parse()
    with pytest.raises(BudgetError, match="one of macs or params, found both"):
        Budget.parse(macs="50%", params="50%")


def test_budget_targets() -> None:
    assert Budget.parse(macs="75%").target(COST) == round(0.75 * COST.dense)
    assert Budget.parse(macs="1.5k").target(COST) == 1500
    assert Budget.parse(macs=COST.dense).target(COST) == COST.dense
    assert Budget.parse(macs=COST.smallest).target(COST) == COST.smallest == 1000
    with pytest.raises(BudgetError, match=r"a budget of 5,000 macs is above the dense model's 2,120; ask for 100%"):
        Budget.parse(macs="5k").target(COST)
    with pytest.raises(BudgetError, match=r"a budget of 212 macs \(10\.0%\) cannot be reached: .* 1k \(47\.2%, 1,000 "):
        Budget.parse(macs="10%").target(COST)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (7, "7"),
        (999, "999"),
        (1000, "1k"),
        (12_345, "12.35k"),
        (999_949, "999.9k"),
        (999_999, "1M"),
        (4_774_552, "4.775M"),
        (999.96e6, "1G"),
        (1_038_642_432, "1.039G"),
        (3.2e12, "3.2T"),
        (5e15, "5000T"),
    ],
)
def test_human_counts(count: float, text: str) -> None:
    assert human(count) == text


def test_count_params_counts_all() -> None:
    assert count_params(nn.Linear(3, 4).requires_grad_(False)) == 16
