"""Decisions by scores: dynamic programming against brute force, and what lands on a budget."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable

import pytest
import torch

import spvit
from spvit.architecture import REPAIRED, Architecture, Attention, dense
from spvit.budget import TOLERANCE, Budget
from spvit.cost import AttentionCost, BlockCost, NetworkCost
from spvit.errors import BudgetError, CalibrationError, NotSearchableError
from spvit.repair.choose import STEPS_PER_SITE, _least_sum, choose
from spvit.repair.errors import Ranking
from spvit.repair.scores import BlockScores
from spvit.replacements.costs import network_costs
from tiny import BOTH, images, make_host

Sites = list[list[tuple[str, int, float]]]


def random_sites(seed: int, scale: int = 1) -> Sites:
    generator = random.Random(seed)

    def option() -> tuple[str, int, float]:
        return "", round(scale * 40 * generator.random()), generator.choice([0.0, 1.0, generator.random()])

    return [[option() for _ in range(generator.randrange(1, 5))] for _ in range(5)]


def brute_force(options: Iterable[tuple[int, float]], limit: int, wanted: int) -> float | None:
    """Return the least score of what costs at most a limit, and at least what is wanted if anything does."""
    fitting = [(cost, score) for cost, score in options if cost <= limit]
    near = [score for cost, score in fitting if cost >= wanted]
    return min(near or [score for _, score in fitting], default=None)


def totals(sites: Sites) -> list[tuple[int, float]]:
    """Return the sums of costs and of scores of every choice."""
    return [
        (sum(cost for _, cost, _ in picks), sum(score for _, _, score in picks)) for picks in itertools.product(*sites)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_the_least_sum_is_that_of_brute_force(seed: int) -> None:
    sites = random_sites(seed)
    everything = totals(sites)
    for limit, width in itertools.product((-1, 0, *range(20, 210, 17)), (0, 9, 400)):
        chosen = _least_sum(sites, limit, limit - width)
        expected = brute_force(everything, limit, limit - width)
        if expected is None:
            assert chosen is None
            continue
        assert all(choice in site for site, choice in zip(sites, chosen, strict=True))
        assert sum(cost for _, cost, _ in chosen) <= limit
        assert sum(score for _, _, score in chosen) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(8))
def test_rounded_costs_never_break_the_limit_and_lose_little(seed: int) -> None:
    sites = random_sites(seed, scale=997_331)
    everything = totals(sites)
    smallest, largest = min(everything)[0], max(everything)[0]
    for limit in (smallest, *range(smallest + 1, largest, max(1, (largest - smallest) // 7)), largest):
        chosen = _least_sum(sites, limit, 0)
        assert sum(cost for _, cost, _ in chosen) <= limit
        tighter = brute_force(everything, limit - (limit // STEPS_PER_SITE + len(sites)), 0)
        if tighter is not None:
            assert sum(score for _, _, score in chosen) <= tighter + 1e-12
    assert _least_sum(sites, smallest - 1, 0) is None


def kinds_costing(msa: int, conv3: int, conv1: int, narrow: int, skip: int = 0) -> dict[str, AttentionCost]:
    """Return costs by kind; the rules of a repair add three to convolutions, and `skip` to skipped layers."""
    return {
        "msa": AttentionCost(msa, narrow, narrow, msa - 2 * 4 * 2 * narrow),
        "conv3": AttentionCost(conv3, rules={REPAIRED.prefix: 3}),
        "conv1": AttentionCost(conv1, rules={REPAIRED.prefix: 3}),
        "skip": AttentionCost(0, rules={REPAIRED.skip: skip}),
    }


def problem(seed: int) -> tuple[tuple[BlockScores, ...], NetworkCost]:
    """Return random scores of two blocks with six FFN units, and costs."""
    generator = random.Random(seed)
    scores, costs = [], []
    for _ in range(2):
        kinds = [Attention(), Attention("msa", query_key_rank=2, value_rank=2), Attention("conv1"), Attention("skip")]
        values = [0.0, *sorted(generator.random() for _ in range(3))]
        units = tuple(generator.sample(range(6), 6))
        falling = (*sorted((generator.random() for _ in range(6)), reverse=True), 0.0)
        scores.append(BlockScores(tuple(zip(kinds, values)), Ranking(units, falling), falling))
        costs.append(
            BlockCost(
                kinds_costing(100, 80, 20, narrow=5, skip=2), generator.randrange(5, 20), 6, heads=2, head_width=4
            )
        )
    return tuple(scores), NetworkCost("params", 1000, tuple(costs))


@pytest.mark.parametrize("attends", [False, True])
@pytest.mark.parametrize("multiple", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_that_of_brute_force(seed: int, multiple: int, attends: bool) -> None:
    scores, cost = problem(seed)
    widths = [width for width in range(1, 7) if width % multiple == 0 or width == 6]
    everything = []
    for first, second in itertools.product(*(itertools.product(block.attention, widths) for block in scores)):
        total = cost.fixed
        if multiple > 2 and (first[0][0].narrowed() or second[0][0].narrowed()):
            continue  # ranks of two are no multiples of it
        if attends and all(attention.kind != "msa" for (attention, _), _ in (first, second)):
            continue
        for (attention, _), width, own in ((*first, cost.blocks[0]), (*second, cost.blocks[1])):
            narrow = 100 - 2 * 2 * (5 + 5)  # two heads lose two dimensions of both sorts
            total += {"msa": narrow if attention.narrowed() else 100, "conv1": 23, "skip": 2}[attention.kind]
            total += own.unit * width
        value = first[0][1] + second[0][1] + scores[0].ffn[first[1]] + scores[1].ffn[second[1]]
        everything.append((total, value))
    for target in range(1000, cost.dense + 1, 29):
        wanted = target - 30 if target % 2 else 0
        expected = brute_force(everything, target, wanted)
        found = choose(scores, cost, target, multiple, wanted, attends)
        if expected is None:
            assert found is None
            continue
        assert found.rules == REPAIRED
        assert cost.of(found) <= target
        value = sum(
            dict(own.attention)[block.attention] + own.ffn[len(block.ffn.units)]
            for own, block in zip(scores, found.blocks)
        )
        assert value == pytest.approx(expected)
        for own, block in zip(scores, found.blocks):
            assert set(block.ffn.units) == set(own.ranking.units[: len(block.ffn.units)])
            assert len(block.ffn.units) in widths
    assert choose(scores, cost, cost.dense, multiple).widths() == (6, 6)


def test_rounding_does_not_keep_many_sites_from_their_budget() -> None:
    generator = random.Random(0)
    scores, costs = [], []
    for _ in range(64):
        kinds = (Attention(), Attention("conv1"), Attention("skip"))
        falling = (*sorted((generator.random() for _ in range(64)), reverse=True), 0.0)
        scores.append(BlockScores(tuple(zip(kinds, (0.0, 1.0, 2.0))), Ranking(tuple(range(64)), falling), falling))
        costs.append(
            BlockCost(
                kinds_costing(99_991, 80, 20_011, narrow=5),
                generator.randrange(2_000, 3_000),
                64,
                heads=2,
                head_width=4,
            )
        )
    cost = NetworkCost("macs", 1000, tuple(costs))
    for share in (0.3, 0.5, 0.9):
        target = round(share * cost.dense)
        architecture = choose(scores, cost, target, 8)
        assert (1 - TOLERANCE) * target <= cost.of(architecture) <= target


@pytest.mark.parametrize("name", BOTH)
def test_decisions_land_just_below_the_budget(name: str) -> None:
    host = spvit.Host.of(make_host(name))
    scores = spvit.score(host, images(host.model, 24))
    for metric, cost in network_costs(host).items():
        found = []
        for budget in ("52%", "60%", "75%", "93%", round(0.8 * cost.dense)):
            architecture = spvit.decide(host, scores=scores, **{metric: budget})
            target = Budget.parse(**{metric: budget}).target(cost)
            assert (1 - TOLERANCE) * target <= cost.of(architecture) <= target
            assert architecture.rules == REPAIRED
            assert Architecture.from_json(architecture.to_json()) == architecture
            found.append(architecture)
        assert len(set(found)) == len(found)
        everything = Architecture(dense([72] * 4).blocks, *REPAIRED)
        assert spvit.decide(host, scores=scores, **{metric: "100%"}) == everything


def test_heads_with_dead_dimensions_are_narrowed() -> None:
    host = make_host("huggingface_options")
    with torch.no_grad():
        for layer in host.vit.layers:
            for projection in (layer.attention.q_proj, layer.attention.v_proj):
                projection.weight.unflatten(0, (3, 16))[:, 8:].zero_()
    cost = network_costs(host)["macs"]
    narrow = Attention("msa", query_key_rank=8, value_rank=8)
    for budget in ("75%", "85%"):  # at 85% there is more to spend than narrow attention takes
        keep = spvit.Constraints(keep_patches=True)
        architecture = spvit.decide(host, macs=budget, calibration=images(host, 24), constraints=keep)
        found = [block.attention for block in architecture.blocks]
        assert found == [narrow] * 4 if budget == "75%" else narrow in found
        assert "msa 8/8" in str(architecture)
        assert 0.995 <= cost.of(architecture) / Budget.parse(macs=budget).target(cost) <= 1


@pytest.mark.parametrize("multiple", [None, 4, 2])
def test_widths_are_multiples_of_what_is_asked(multiple: int | None) -> None:
    host = make_host("class_token")
    architecture = spvit.decide(host, macs="75%", multiple=multiple, calibration=images(host, 24).split(1))
    step = 4 if multiple is None else multiple  # eight is too coarse here, so half of it is taken
    assert all(width % step == 0 for width in architecture.widths())


def test_units_that_are_not_used_do_not_keep_a_decision_from_its_budget() -> None:
    host = make_host("class_token")
    with torch.no_grad():
        for block in host.blocks:
            block.mlp.fc2.weight[:, ::2] = 0
    cost = network_costs(host)["macs"]
    for share in (0.9, 0.97):
        architecture = spvit.decide(host, macs=f"{share:.0%}", calibration=images(host, 24))
        assert 0.995 * share <= cost.of(architecture) / cost.dense <= share
        for block in architecture.blocks:
            assert set(range(1, 72, 2)) <= set(block.ffn.units)


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_budgets_below_the_smallest_name_it_and_it_is_reached(metric: str) -> None:
    host = make_host("class_token")
    x = images(host, 16)
    cost = network_costs(host)[metric]
    with pytest.raises(
        BudgetError, match="cannot be reached with FFN widths that are multiples of 1: the sma"
    ) as caught:
        spvit.decide(host, calibration=x, **{metric: cost.smallest})
    smallest = int(re.search(rf"([\d,]+) {metric}\)", str(caught.value))[1].replace(",", ""))
    assert cost.of(spvit.decide(host, calibration=x, **{metric: smallest})) == smallest
    with pytest.raises(BudgetError, match="cannot be reached"):
        spvit.decide(host, calibration=x, **{metric: smallest - 1})


def test_a_class_token_keeps_some_attention_to_the_image() -> None:
    for name, kept in (("class_token", 1), ("average_pooling", 0)):
        host = make_host(name)
        cost = network_costs(host)["macs"]
        x = images(host, 24)
        with pytest.raises(BudgetError, match="the smallest reachable is") as caught:
            spvit.decide(host, macs=cost.smallest, calibration=x)
        smallest = int(re.search(r"([\d,]+) macs\)", str(caught.value))[1].replace(",", ""))
        architecture = spvit.decide(host, macs=smallest, calibration=x)
        assert sum(block.attention.kind == "msa" for block in architecture.blocks) == kept


def test_decisions_that_cannot_be_made_are_refused() -> None:
    host = make_host("class_token")
    x = images(host, 16)
    with pytest.raises(
        BudgetError, match=r"no FFN widths that are multiples of 36 come within 0\.5% of .* macs; use a sm"
    ):
        spvit.decide(host, macs="97%", multiple=36, calibration=x)
    with pytest.raises(BudgetError, match="multiple is 0, expected 1 or more units"):
        spvit.decide(host, macs="50%", multiple=0, calibration=x)
    with pytest.raises(BudgetError, match="a budget is one of macs, params or latency, found none"):
        spvit.decide(host, calibration=x)
    with pytest.raises(BudgetError, match="cannot be reached: the smallest reachable is"):
        spvit.decide(host, macs="1%", calibration=x)
    with pytest.raises(
        spvit.CalibrationError, match="decide takes scores or calibration images, found both; leave one of "
    ):
        spvit.decide(host, macs="50%", calibration=x, scores=spvit.score(host, x))
    with pytest.raises(BudgetError, match="a budget is one of macs, params or latency, found macs and params"):
        spvit.decide(host, macs="50%", params="50%", calibration=x)
    with pytest.raises(BudgetError, match="is above the dense model's"):
        spvit.decide(host, macs="1T", calibration=x)
    with pytest.raises(CalibrationError, match="one calibration image is too few"):
        spvit.decide(host, macs="50%", calibration=x[:1])
    with pytest.raises(NotSearchableError, match="this model is already searchable or pruned by spvit; start from the"):
        spvit.decide(spvit.make_searchable(host), macs="50%", calibration=x)
