"""Gates that start from scores: brute force on small cases, and the architecture that they stand for."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

import spvit
from spvit.hosts import family_of
from spvit.initial_gates import LARGEST, attention_choices, logits_of_choices, price
from spvit.scores import score
from spvit.surgery import NotSearchableError, gated_layers, search_record
from tiny import images, make_host


def random_sites(seed: int, count: int = 3) -> list[list[tuple[float, float]]]:
    generator = random.Random(seed)
    return [
        [(generator.uniform(0, 9), generator.uniform(0, 2)) for _ in range(generator.randint(2, 5))]
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_a_gate_is_open_exactly_if_the_better_choice_is_behind_it(seed: int) -> None:
    for choices in random_sites(seed):
        value = random.Random(seed).uniform(0.01, 1)
        totals = [score + value * cost for cost, score in choices]
        logits = logits_of_choices(choices, value)
        assert [logit > 0 for logit in logits] == [
            min(totals[gate:]) < min(totals[:gate]) for gate in range(1, len(totals))
        ]
        assert max(map(abs, logits)) <= LARGEST
        opened = next((gate for gate, logit in enumerate(logits) if logit <= 0), len(logits))
        assert totals[opened] == min(totals)


def test_a_logit_is_the_logarithm_of_gain_over_cost() -> None:
    assert logits_of_choices([(0, 1.0), (10, 0.4)], 0.03) == pytest.approx([math.log(0.6 / 0.3)])
    assert logits_of_choices([(10, 0.4), (0, 1.0)], 0.03) == pytest.approx([math.log(0.3 / 0.6)])
    assert logits_of_choices([(0, 1.0), (5, 1.2)], 0.03) == [-LARGEST]
    assert logits_of_choices([(5, 1.2), (0, 1.0)], 0.03) == [LARGEST]


@pytest.mark.parametrize("seed", range(20))
def test_the_price_is_the_lowest_at_which_the_best_choices_are_affordable(seed: int) -> None:
    sites = random_sites(seed)
    target = random.Random(seed).uniform(3, 15)

    def cost_at(value: float) -> float:
        return sum(min(choices, key=lambda choice: (choice[1] + value * choice[0], choice[0]))[0] for choices in sites)

    found = price(sites, target)
    cheapest = sum(min(choices)[0] for choices in sites)
    assert cost_at(found) <= max(target, cheapest) + 1e-9
    assert found == 0 or cost_at(found * (1 - 1e-9)) > max(target, cheapest) - 1e-9
    # No choice of the same cost or less scores better than the one at a price: brute force over all.
    picked = sum(min(choices, key=lambda choice: (choice[1] + found * choice[0], choice[0]))[1] for choices in sites)
    for combination in itertools.product(*sites):
        if sum(cost for cost, _ in combination) <= cost_at(found):
            assert sum(score for _, score in combination) >= picked - 1e-9


@pytest.mark.parametrize("name", ["class_token", "swin", "huggingface", "options"])
def test_a_network_starts_at_the_choice_of_the_price(name: str) -> None:
    host = make_host(name)
    calibration = images(host, 48, seed=3)
    net = spvit.make_searchable(host, calibration=calibration, multiple=2)
    untouched = {key: value.clone() for key, value in net.state_dict().items() if not key.endswith("gate_logits")}
    spvit.initialise_gates(net, host, macs="60%", calibration=calibration)
    cost = search_record(net).costs["macs"]
    architecture = spvit.decide(net)
    scores = score(host, family_of(host), calibration, 2)
    sites = []
    for block, own, (attention, _) in zip(scores, cost.blocks, gated_layers(net)):
        gates = attention.rank_gates()
        sites.append(attention_choices(block, own, () if gates is None else gates.ranks))
        sites.append([(own.unit * width, value) for width, value in enumerate(block.ffn)])
    value = price(sites, 0.6 * cost.dense - cost.fixed)
    best = cost.fixed + sum(min(choices, key=lambda choice: choice[1] + value * choice[0])[0] for choices in sites)
    assert cost.of(architecture) == pytest.approx(best, rel=1e-6)
    assert best <= 0.6 * cost.dense
    for block, kept in zip(scores, architecture.blocks):
        assert set(kept.ffn.units) == set(block.ranking.units[: len(kept.ffn.units)])
    assert all(torch.equal(net.state_dict()[key], value) for key, value in untouched.items())


def test_refuses_what_has_no_repaired_candidates() -> None:
    host = make_host("class_token")
    with pytest.raises(NotSearchableError, match="make it with spvit.make_searchable\\(host, calibration=images\\)"):
        spvit.initialise_gates(spvit.make_searchable(host), host, macs="50%", calibration=images(host, 8))
    net = spvit.make_searchable(host, calibration=images(host, 32))
    with pytest.raises(spvit.BudgetError, match="a budget is one of macs or params, found neither"):
        spvit.initialise_gates(net, host, calibration=images(host, 8))
