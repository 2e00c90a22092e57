"""Budgets: every way to state one, what is refused, and numbers as people read them."""

from __future__ import annotations

from typing import Any

import pytest

from spvit.budget import Budget, human
from spvit.cost import AttentionCost, BlockCost, NetworkCost
from spvit.errors import BudgetError

BLOCKS = (BlockCost({"msa": AttentionCost(400)}, 2, 50), BlockCost({"msa": AttentionCost(500)}, 3, 40))
COST = NetworkCost("macs", 1000, BLOCKS)


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


OTHER_TYPES = [0, -3, True, b"50%", ("50%",)]


@pytest.mark.parametrize("value", [*WORDS, *FRACTIONS, *OTHER_TYPES])
def test_malformed_budgets_are_refused(value: Any) -> None:
    with pytest.raises(BudgetError, match=r'macs budget .* is malformed, expected a share like "50%", an amount like'):
        Budget.parse(macs=value)


@pytest.mark.parametrize("value", ["0%", "0.0%", "101%", "1000%"])
def test_shares_out_of_range_are_refused(value: str) -> None:
    with pytest.raises(BudgetError, match=f"params budget '{value}' is out of range, expected above 0% and at most"):
        Budget.parse(params=value)


def test_a_budget_is_exactly_one_metric() -> None:
    with pytest.raises(BudgetError, match="one of macs, params or latency, found none"):
        Budget.parse()
    with pytest.raises(BudgetError, match="one of macs, params or latency, found macs and params"):
        Budget.parse(macs="50%", params="50%")


def test_budget_targets() -> None:
    assert Budget.parse(macs="75%").target(COST) == round(0.75 * COST.dense)
    assert Budget.parse(macs="1.5k").target(COST) == 1500
    assert Budget.parse(macs=COST.dense).target(COST) == COST.dense
    assert Budget.parse(macs=COST.smallest).target(COST) == COST.smallest == 1000
    with pytest.raises(
        BudgetError, match=r"a budget of 5,000 macs is above the dense model's 2,120 macs; ask for 100%"
    ):
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
        (-1500, "-1.5k"),
    ],
)
def test_human_counts(count: float, text: str) -> None:
    assert human(count) == text
