"""Scores of choices between the measured ones: lines through logarithms, by rank and by what is missed."""

from __future__ import annotations

import itertools
import math

import pytest

from spvit.architecture import Attention
from spvit.repair.errors import Missed
from spvit.repair.interpolation import (
    FLOOR,
    by_errors,
    interpolated_widths,
    measured_choices,
    on_lines,
    with_all_ranks,
)


@pytest.mark.parametrize(
    ("x", "expected"), [(1.0, 10.0), (2.0, 20.0), (4.0, 0.0), (1.5, 15.0), (3.0, 10.0), (0.0, 0.0), (5.0, -10.0)]
)
def test_lines_pass_through_their_points_and_go_on(x: float, expected: float) -> None:
    assert on_lines(x, [1.0, 2.0, 4.0], [10.0, 20.0, 0.0]) == pytest.approx(expected)
    assert on_lines(x, [7.0], [3.0]) == x - 4.0


def test_ranks_between_areon_lines_of_the_logarithm() -> None:
    known = {Attention.narrow(8): 1e-2, Attention(value_rank=8): 5e-3, Attention.narrow(24): 1e-4}
    found = dict(with_all_ranks(known, range(8, 32, 8)))
    assert found.pop(Attention.narrow(16)) == pytest.approx(1e-3)
    assert found == known
    assert with_all_ranks({}, range(8, 32, 8)) == []


def test_errors_of_queries_and_of_values_tell_their_own_parts() -> None:
    errors = {
        Attention(query_key_rank=4): Missed(2.0, 0.0),
        Attention(value_rank=4): Missed(0.0, 2.0),
        Attention(value_rank=8): Missed(0.0, 1.0),
        Attention(heads=(0,), query_key_rank=4): Missed(2.0, 4.0),
        Attention.narrow(8): Missed(0.5, 1.0),
    }
    measured = {Attention(query_key_rank=4): 0.8, Attention(value_rank=4): 0.04, Attention(value_rank=8): 0.01}
    found = by_errors(measured, errors)
    assert {kept: found[kept] for kept in measured} == pytest.approx(measured)
    assert found[Attention(heads=(0,), query_key_rank=4)] == pytest.approx(0.8 + 0.16)
    assert found[Attention.narrow(8)] == pytest.approx(0.2 + 0.01)
    assert by_errors({}, {}) == {}


def test_what_is_measured_is_narrower_in_one_way_only() -> None:
    ranks = (8, 16, 24, None)
    heads = ((5,), (2, 5), (0, 2, 5), None)
    errors = {
        Attention("msa", kept, query, value): Missed(0.0, 0.0)
        for kept, query, value in itertools.product(heads, ranks, ranks)
    }
    del errors[Attention()]
    assert measured_choices(errors, 32) == [
        Attention(query_key_rank=8),
        Attention(query_key_rank=16),
        Attention(value_rank=8),
        Attention(value_rank=16),
        Attention(heads=(2, 5)),
    ]
    assert measured_choices({}, 32) == []


def test_widths_between_follow_the_error_after_repair() -> None:
    errors = (8.0, 4.0, 2.0, 1.0, 0.5, 0.0)
    found = interpolated_widths([(1, 0.4), (3, 0.1)], errors)
    assert found[:5] == pytest.approx((0.8, 0.4, 0.2, 0.1, 0.05))
    assert found[5] == 0
    found = interpolated_widths([(1, 0.1), (3, 0.4)], errors)  # noise says that fewer units are better
    assert all(a > b for a, b in itertools.pairwise(found))
    assert found[:5] == pytest.approx((0.4,) * 5)
    dead = interpolated_widths([(1, 0.1)], (1.0, 0.5, 0.0, 0.0))
    assert dead[1] == pytest.approx(0.1)
    assert 0 < dead[2] < 2 * FLOOR
    assert math.isclose(dead[3], 0)
    single = interpolated_widths([], (1.0, 0.0))  # a single unit: no width in between to measure
    assert len(single) == 2
    assert single[0] > single[1] == 0
