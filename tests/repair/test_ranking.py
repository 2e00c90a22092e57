"""Rankings of units and of heads against brute force: each step removes the cheapest, errors are those after repair."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from spvit.moments import damped
from spvit.repair.errors import STEPS, rank_heads, rank_units
from tiny import assert_close

DOUBLE = torch.float64
RIDGE = 1e-3


def problem(units: int, outputs: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a covariance of correlated units and output weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * units, units, generator=generator, dtype=DOUBLE)
    x = x @ torch.randn(units, units, generator=generator, dtype=DOUBLE)
    return torch.cov(x.T, correction=0), torch.randn(outputs, units, generator=generator, dtype=DOUBLE)


def repaired_error(covariance: Tensor, weight: Tensor, kept: list[int]) -> float:
    """Return the damped squared error that the best weights on the kept units leave: a direct solve."""
    damped_covariance = damped(covariance, RIDGE)
    removed = [unit for unit in range(len(covariance)) if unit not in kept]
    wanted = weight[:, removed]
    cross = damped_covariance[kept][:, removed]
    fitted = torch.linalg.solve(damped_covariance[kept][:, kept], cross) if kept else cross
    left = damped_covariance[removed][:, removed] - cross.T @ fitted
    return float((wanted @ left @ wanted.T).trace())


@pytest.mark.parametrize("seed", range(4))
def test_every_step_gives_up_the_unit_that_is_cheapest_by_brute_force(seed: int) -> None:
    covariance, weight = problem(9, seed=seed)
    ranking = rank_units(covariance, weight, RIDGE)
    assert sorted(ranking.units) == list(range(9))
    assert len(ranking.errors) == 10
    for count in range(9):
        before = list(ranking.units[: count + 1])
        errors = {unit: repaired_error(covariance, weight, [u for u in before if u != unit]) for unit in before}
        assert min(errors, key=errors.__getitem__) == ranking.units[count]
        assert ranking.errors[count] == pytest.approx(errors[ranking.units[count]], rel=1e-8)
    assert ranking.errors[9] == 0
    assert list(ranking.errors) == sorted(ranking.errors, reverse=True)
    plain = weight.square().sum(0) * covariance.diagonal()
    assert ranking.units != tuple(plain.argsort(descending=True).tolist())  # the rest making up for it matters


def test_ranking_is_near_the_best_subsets() -> None:
    covariance, weight = problem(8)
    ranking = rank_units(covariance, weight, RIDGE)
    for count in (2, 4, 6):
        all_errors = sorted(
            repaired_error(covariance, weight, list(kept)) for kept in itertools.combinations(range(8), count)
        )
        rank = sum(error < ranking.errors[count] - 1e-9 for error in all_errors)
        assert rank <= len(all_errors) // 8


def test_large_layers_give_up_groups_and_their_errors_stay_exact() -> None:
    units = 2 * STEPS + 6
    covariance, weight = problem(units)
    ranking = rank_units(covariance, weight, RIDGE)
    assert sorted(ranking.units) == list(range(units))
    for count in range(0, units, 26):  # every group of two ends at an even count
        expected = repaired_error(covariance, weight, list(ranking.units[:count]))
        assert ranking.errors[count] == pytest.approx(expected, rel=1e-6)
    assert ranking.errors[5] == pytest.approx((ranking.errors[4] + ranking.errors[6]) / 2)


def test_what_is_not_used_or_is_there_twice_goes_first_and_for_nothing() -> None:
    covariance, weight = problem(6)
    weight[:, 3] = 0
    twin = torch.cat([torch.eye(6, dtype=DOUBLE), torch.eye(6, dtype=DOUBLE)[:1]])  # unit 6 is unit 0 again
    ranking = rank_units(twin @ covariance @ twin.T, torch.cat([weight, weight[:, :1]], dim=1), 1e-9)
    assert set(ranking.units[-2:]) in ({3, 0}, {3, 6})
    assert ranking.errors[7] == 0
    assert ranking.errors[5] <= 1e-6 * ranking.errors[0]
    assert ranking.errors[4] > 1e-3 * ranking.errors[0]


@pytest.mark.parametrize("covariance", [torch.zeros(5, 5), torch.ones(5, 5)], ids=["constant", "all the same"])
def test_singular_covariances_are_ranked(covariance: Tensor) -> None:
    weight = problem(5)[1]
    ranking = rank_units(covariance, weight, RIDGE)
    assert sorted(ranking.units) == list(range(5))
    assert all(torch.tensor(ranking.errors).isfinite())


def test_single_precision_covariances_of_few_directions_are_ranked() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 4, generator=generator) @ torch.randn(4, 32, generator=generator)
    covariance = x.T @ x / 5000
    weight = torch.randn(3, 32, generator=generator)
    before = weight.clone()
    ranking = rank_units(covariance, weight, 1e-7)
    assert_close(weight, before)
    assert ranking.errors[4] < 1e-3 * ranking.errors[0]  # four units tell all


@pytest.mark.parametrize("seed", range(4))
def test_every_step_gives_up_the_head_that_is_cheapest_by_brute_force(seed: int) -> None:
    covariance, weight = problem(12, seed=seed)
    ranking = rank_heads(covariance, weight, 4, RIDGE)
    assert sorted(ranking.units) == [0, 1, 2, 3]
    assert ranking.errors[4] == 0

    def error(heads: list[int]) -> float:
        return repaired_error(covariance, weight, [3 * head + index for head in heads for index in range(3)])

    for count in range(4):
        before = sorted(ranking.units[: count + 1])
        errors = {head: error([other for other in before if other != head]) for head in before}
        assert min(errors, key=errors.__getitem__) == ranking.units[count]
        assert ranking.errors[count] == pytest.approx(errors[ranking.units[count]], rel=1e-8)


def test_heads_of_one_dimension_are_ranked_as_units_are() -> None:
    covariance, weight = problem(7)
    units, heads = rank_units(covariance, weight, RIDGE), rank_heads(covariance, weight, 7, RIDGE)
    assert heads.units == units.units
    assert heads.errors == pytest.approx(units.errors)
