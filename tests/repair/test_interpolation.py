"""Scores of choices between the measured ones: in proportion to what is missed, and on lines by rank."""

from __future__ import annotations

import itertools
import math

import pytest

from spvit.architecture import Attention
from spvit.repair.interpolation import FLOOR, by_errors, interpolated_widths, measured_choices, with_all_ranks


def test_ranks_between_are_on_lines_of_the_logarithm() -> None:
    known = {Attention.narrow(8): 1e-2, Attention(value_rank=8): 5e-3, Attention.narrow(24): 1e-4}
    found = dict(with_all_ranks(known, range(4, 32, 4)))
    assert found.pop(Attention.narrow(16)) == pytest.approx(1e-3)
    assert found.pop(Attention.narrow(12)) == pytest.approx(10**-2.5)
    assert Attention.narrow(4) not in found  # nothing is known of less than the lowest
    assert {kept: found[kept] for kept in known} == known
    assert with_all_ranks({}, range(8, 32, 8)) == []


def test_scores_are_in_proportion_to_errors_as_far_as_is_known() -> None:
    errors = (16.0, 8.0, 4.0, 2.0, 1.0, 0.0)
    assert by_errors(errors, {2: 0.4}) == pytest.approx([1.6, 0.8, 0.4, 0.2, 0.1, 0.0])
    # Twice as much of it at 2 as at 8: half way between in logarithms, and as much beyond.
    assert by_errors(errors, {3: 0.4, 1: 0.8}) == pytest.approx([1.6, 0.8, 0.4 * 2**0.5, 0.4, 0.2, 0.0])
    assert by_errors((), {}) == []


def test_what_is_measured_is_spread_over_what_choices_miss() -> None:
    errors = {Attention(value_rank=rank): 1 / rank for rank in range(1, 9)}
    assert [kept.value_rank for kept in measured_choices(errors)] == [6, 4, 2]
    assert measured_choices({Attention(value_rank=1): 1.0}) == [Attention(value_rank=1)]
    assert measured_choices({}) == []


def test_widths_between_follow_the_error_after_repair() -> None:
    errors = (8.0, 4.0, 2.0, 1.0, 0.5, 0.0)
    found = interpolated_widths({1: 0.4, 3: 0.1}, errors)
    assert found[:5] == pytest.approx((0.8, 0.4, 0.2, 0.1, 0.05))
    assert found[5] == 0
    found = interpolated_widths({1: 0.1, 3: 0.4}, errors)  # noise says that fewer units are better
    assert all(a > b for a, b in itertools.pairwise(found))
    assert found[:4] == pytest.approx((0.4,) * 4)
    dead = interpolated_widths({1: 0.1}, (1.0, 0.5, 0.0, 0.0))
    assert dead[1] == pytest.approx(0.1)
    assert 0 < dead[2] < 2 * FLOOR
    assert math.isclose(dead[3], 0)
    single = interpolated_widths({}, (1.0, 0.0))  # a single unit: no width in between to measure
    assert len(single) == 2
    assert single[0] > single[1] == 0
