"""Decisions of a searched network: what its gates say, and FFN widths shifted to a budget."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import spvit
from spvit.architecture import FFN
from spvit.cost import NetworkCost
from spvit.errors import BudgetError
from spvit.search.network import gated_layers, search_record
from tiny import BOTH, EVERYTHING, MIXED, WIDTH, choose, make_host, make_net, randomise


def _cost(net: nn.Module, metric: str) -> NetworkCost:
    return search_record(net).costs[metric]


def test_without_a_budget_the_decision_is_the_gates() -> None:
    _, net = make_net("class_token")
    architecture = spvit.decide(net)
    for (_, ffn), block in zip(gated_layers(net), architecture.blocks):
        assert list(block.ffn.units) == [i for i, logit in enumerate(ffn.gate_logits.tolist()) if logit > 0]
    rounded = spvit.decide(net, multiple=8)
    assert rounded.kinds() == MIXED
    for width, exact in zip(rounded.widths(), architecture.widths()):
        assert width % 8 == 0
        assert abs(width - exact) <= 4


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("name", BOTH)
def test_decisions_land_on_the_budget(name: str, metric: str, seed: int) -> None:
    _, net = make_net(name)
    randomise(net, seed=10 + seed)
    cost = _cost(net, metric)
    unbound = spvit.decide(net)
    bounds = [
        cost.of(replace(unbound, blocks=tuple(replace(b, ffn=FFN(WIDTH, tuple(range(n)))) for b in unbound.blocks)))
        for n in (8, WIDTH)
    ]
    for share in (0.0, 0.1, 0.33, 0.5, 0.77, 1.0):
        target = round(bounds[0] + share * (bounds[1] - bounds[0]))
        architecture = spvit.decide(net, **{metric: target})
        assert abs(cost.of(architecture) - target) <= 0.005 * target
        assert architecture.kinds() == unbound.kinds()
        for (_, ffn), block in zip(gated_layers(net), architecture.blocks):
            kept = torch.zeros(WIDTH, dtype=torch.bool)
            kept[list(block.ffn.units)] = True
            if 0 < kept.sum() < WIDTH:
                assert ffn.gate_logits[kept].min() > ffn.gate_logits[~kept].max()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", ["55%", "70%", "85%"])
def test_widths_are_multiples_of_eight_where_they_can_be(budget: str, seed: int) -> None:
    timm = pytest.importorskip("timm")
    host = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=24, depth=4, num_heads=3, mlp_ratio=16)
    net = choose(randomise(spvit.make_searchable(host), seed=seed), ("msa", "conv3", "msa", "msa"))
    cost = _cost(net, "macs")
    architecture = spvit.decide(net, macs=budget)
    assert all(width % 8 == 0 for width in architecture.widths())
    assert abs(cost.of(architecture) / cost.dense - float(budget[:-1]) / 100) < 0.005 * float(budget[:-1]) / 100
    odd = spvit.decide(net, macs=budget, multiple=1)
    assert any(width % 8 for width in odd.widths())
    assert abs(cost.of(odd) / cost.dense - float(budget[:-1]) / 100) < 0.005 * float(budget[:-1]) / 100
    widths = spvit.decide(net, macs=budget, multiple=16).widths()
    assert all(width % 16 == 0 for width in widths)


def test_all_blocks_share_one_threshold() -> None:
    _, net = make_net("class_token")
    architecture = spvit.decide(net, macs="65%", multiple=1)
    kept, dropped = [], []
    for (_, ffn), block in zip(gated_layers(net), architecture.blocks):
        values = ffn.gate_logits.tolist()
        kept += sorted(values[i] for i in block.ffn.units)[:-1]  # each block keeps its best unit in any case
        dropped += [value for i, value in enumerate(values) if i not in block.ffn.units]
    assert min(kept) > max(dropped)


def test_ties_go_evenly_over_the_blocks() -> None:
    net = spvit.make_searchable(make_host("class_token"))
    for budget in ("76%", "85%", "95%"):
        widths = spvit.decide(net, macs=budget).widths()
        assert max(widths) < WIDTH
        assert max(widths) - min(widths) <= 8
    assert spvit.decide(net, macs="100%") == EVERYTHING


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_unreachable_budgets_name_the_nearest_that_is_reachable(metric: str) -> None:
    _, net = make_net("class_token")
    cost = _cost(net, metric)
    for word, target in (("smallest", cost.smallest), ("largest", cost.dense)):
        message = rf"cannot be reached with the attention layers that the gates keep: the {word} reachable is "
        with pytest.raises(BudgetError, match=message) as caught:
            spvit.decide(net, **{metric: target})
        bound = int(re.search(rf"([\d,]+) {metric}\)", str(caught.value))[1].replace(",", ""))
        assert cost.of(spvit.decide(net, **{metric: bound})) == bound
        beyond = round(bound * (0.99 if word == "smallest" else 1.01))
        with pytest.raises(BudgetError, match=rf"the {word} reachable is"):
            spvit.decide(net, **{metric: beyond})


def test_budgets_that_cannot_be_decided_are_refused() -> None:
    _, net = make_net("class_token")
    with pytest.raises(BudgetError, match=r"no FFN widths that are multiples of 36 come within 0\.5% of .* macs; use"):
        spvit.decide(net, macs="69.5%", multiple=36)
    with pytest.raises(BudgetError, match="multiple is 0, expected 1 or more units"):
        spvit.decide(net, multiple=0)
    with pytest.raises(BudgetError, match="found macs and params"):
        spvit.decide(net, macs="50%", params="50%")
    with pytest.raises(BudgetError, match="malformed"):
        spvit.decide(net, macs="half")
    with pytest.raises(BudgetError, match="above the dense model's"):
        spvit.decide(net, params="1T")
    with pytest.raises(BudgetError, match=r"of 7\.422k macs \(1\.0%\) cannot be reached: the smallest reachable is"):
        spvit.decide(net, macs="1%")
