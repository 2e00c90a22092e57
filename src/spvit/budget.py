"""Budgets, parsed once where a user states them, and numbers as people read them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from spvit.architecture import DEFAULT_MULTIPLE
from spvit.cost import NetworkCost
from spvit.errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """How much of a metric a network may cost: a fraction of the dense cost, or an amount."""

    metric: str
    fraction: float | None = None
    amount: int | None = None

    @staticmethod
    def parse(
        macs: str | int | None = None,
        params: str | int | None = None,
        latency: str | None = None,
        default: str | None = None,
    ) -> Budget:
        """Return the budget that exactly one of the arguments states.

        Args:
            macs: `"50%"` of the dense cost, `"1.0G"` (k, M, G, T), or a whole number of MACs of one image.
            params: the same, in parameters.
            latency: `"60%"` of the dense latency, or `"8ms"` (s, ms, us, ns) for one pass of a batch.
            default: of MACs, where none of them is given.

        Raises:
            BudgetError: none or several are given, or the text is none of these.
        """
        stated = {"macs": macs, "params": params, "latency": latency}
        given = {metric: value for metric, value in stated.items() if value is not None}
        if not given and default is not None:
            given = {"macs": default}
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise BudgetError(f'a budget is one of macs, params or latency, found {found}; write it as macs="50%"')
        [(metric, value)] = given.items()
        match = _BUDGETS[metric].fullmatch(str(value))
        if match is None or isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise _malformed(metric, value)
        number, unit = Fraction(match[1]), match[2]
        if unit == "%":
            if not 0 < number <= 100:
                raise BudgetError(f"{metric} budget {value!r} is out of range, expected above 0% and at most 100%")
            return Budget(metric, fraction=float(number / 100))
        share = f"{float(number if number >= 1 else 100 * number):g}%"
        if not unit and metric == "latency":
            raise BudgetError(f'{metric} budget {value} has no unit; write "{value}ms", or "{share}" for a share')
        if not unit and 0 < number <= 100 and (number < 1 or number.denominator == 1):  # no network is that small
            meaning = f"is {value} {metric}" if number >= 1 else "is less than one"
            raise BudgetError(f'{metric} budget {value} {meaning}; for that share of the dense model write "{share}"')
        amount = number * _UNITS[unit] if metric != "latency" else Fraction(round(number * _UNITS[unit]))
        if amount.denominator != 1 or amount < 1:
            raise _malformed(metric, value)
        return Budget(metric, amount=int(amount))

    @property
    def stated(self) -> dict[str, Any]:
        """The budget as an argument of `decide`."""
        share = None if self.fraction is None else f"{100 * self.fraction:.12g}%"
        return {self.metric: share or (f"{self.amount}ns" if self.metric == "latency" else self.amount)}

    def target(self, cost: NetworkCost) -> int:
        """Return the target in the metric's units. Raises BudgetError when no architecture costs that."""
        dense, smallest = cost.dense, cost.smallest
        target = round(dense * self.fraction) if self.fraction is not None else self.amount
        assert target is not None
        if target < smallest:
            raise BudgetError(
                f"a budget of {in_words(self.metric, target)} ({target / dense:.1%}) cannot be reached: the smallest "
                f"reachable is {least_in_words(cost, smallest)}"
            )
        if target > dense:
            own, most = (in_words(self.metric, count, exact=True) for count in (target, dense))
            raise BudgetError(f"a budget of {own} is above the dense model's {most}; ask for 100% or less")
        return target


DEFAULT_BUDGET = "50%"
"""Of MACs, for what takes a budget and gets none."""
TOLERANCE, TOLERANCE_MEASURED = 0.005, 0.03
"""How near to its budget an architecture is to come, as a share of it: what is counted, and latency."""
MULTIPLES = (DEFAULT_MULTIPLE, 4, 2, 1)
"""What widths and ranks are multiples of, in the order in which they are tried where none is asked for."""

_NUMBER = r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*"
_COUNT, _TIME = re.compile(rf"{_NUMBER}([%kKMGT]?)\s*"), re.compile(rf"{_NUMBER}(%|s|ms|us|ns|)\s*")
_BUDGETS = {"macs": _COUNT, "params": _COUNT, "latency": _TIME}
_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}


def _malformed(metric: str, value: object) -> BudgetError:
    amounts = 'an amount like "1.0G" or "300M", or a whole number'
    if metric == "latency":
        amounts = 'or a time like "8ms" or "800us"'
    return BudgetError(f'{metric} budget {value!r} is malformed, expected a share like "50%", {amounts}')


def in_words(metric: str, count: float, exact: bool = False) -> str:
    """Return how much of a metric that is, in words: 1.039G macs, or exactly 1,038,642,432 macs; 8.21 ms."""
    if metric == "latency":
        return f"{count / 1e6:.4g} ms"
    return f"{count:,} {metric}" if exact else f"{human(count)} {metric}"


def least_in_words(cost: NetworkCost, smallest: int) -> str:
    """Return the smallest cost that can be reached, in words."""
    share = f"{smallest / cost.dense:.1%}"
    if cost.metric == "latency":
        return f"{in_words(cost.metric, smallest)} ({share}); {cost.note}"
    return f"{human(smallest)} ({share}, {in_words(cost.metric, smallest, exact=True)})"


def human(count: float) -> str:
    """Return a count with a unit prefix, to four significant digits: 1.039G, 4.775M."""
    if count <= 0:
        return f"-{human(-count)}" if count else "0"
    power = min(max(int(math.log10(count) // 3), 0), 4)
    scaled = count / 1000**power
    if f"{scaled:.4g}" in ("1000", "1e+03") and power < 4:
        power, scaled = power + 1, scaled / 1000
    return f"{scaled:.4g}" + ["", "k", "M", "G", "T"][power]


def check_multiple(multiple: int | None) -> None:
    """Raise BudgetError unless widths and ranks can be multiples of it; None is for a default."""
    if multiple is not None and multiple < 1:
        raise BudgetError(f"multiple is {multiple}, expected 1 or more units")


def tolerance(metric: str) -> float:
    """Return how near to a budget of a metric an architecture is to come."""
    return TOLERANCE_MEASURED if metric == "latency" else TOLERANCE


def too_coarse(multiple: int, metric: str, target: int) -> BudgetError:
    """Return the error that says that no widths of a multiple come near enough to a target."""
    found = f"no FFN widths that are multiples of {multiple} come within {tolerance(metric):.1%} of"
    return BudgetError(f"{found} {in_words(metric, target, exact=True)}; use a smaller multiple or another budget")
