"""Budgets, parsed once where a user states them, and numbers as people read them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

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
    def parse(macs: str | int | None = None, params: str | int | None = None) -> Budget:
        """Return the budget that exactly one of the two arguments states.

        Args:
            macs: `"50%"` of the dense cost, `"1.0G"` (k, M, G, T), or a whole number of MACs of one image.
            params: the same, in parameters.

        Raises:
            BudgetError: none or both are given, or the text is none of these.
        """
        given = [(metric, value) for metric, value in (("macs", macs), ("params", params)) if value is not None]
        if len(given) != 1:
            found = "both" if given else "neither"
            raise BudgetError(f'a budget is one of macs or params, found {found}; write for example macs="50%"')
        metric, value = given[0]
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise _malformed(metric, value)
        match = _BUDGET.fullmatch(str(value))
        if match is None:
            raise _malformed(metric, value)
        number, unit = Fraction(match[1]), match[2]
        if unit == "%":
            if not 0 < number <= 100:
                raise BudgetError(f"{metric} budget {value!r} is out of range, expected above 0% and at most 100%")
            return Budget(metric, fraction=float(number / 100))
        if not unit and 0 < number <= 100 and (number < 1 or number.denominator == 1):  # no network is that small
            share = f"{float(number if number >= 1 else 100 * number):g}%"
            meaning = f"is {value} {metric}" if number >= 1 else "is less than one"
            raise BudgetError(f'{metric} budget {value} {meaning}; for that share of the dense model write "{share}"')
        amount = number * _UNITS[unit]
        if amount.denominator != 1 or amount < 1:
            raise _malformed(metric, value)
        return Budget(metric, amount=int(amount))

    def target(self, cost: NetworkCost) -> int:
        """Return the target in MACs or parameters. Raises BudgetError when no architecture costs that."""
        dense, smallest = cost.dense, cost.smallest
        target = round(dense * self.fraction) if self.fraction is not None else self.amount
        assert target is not None
        if target < smallest:
            raise BudgetError(
                f"a budget of {human(target)} {self.metric} ({target / dense:.1%}) cannot be reached: the smallest "
                f"reachable is {human(smallest)} ({smallest / dense:.1%}, {smallest:,} {self.metric})"
            )
        if target > dense:
            raise BudgetError(
                f"a budget of {target:,} {self.metric} is above the dense model's {dense:,}; ask for 100% or less"
            )
        return target


TOLERANCE = 0.005
"""How near to its budget an architecture is to come, as a share of it."""
MULTIPLES = (DEFAULT_MULTIPLE, 4, 2, 1)
"""What widths and ranks are multiples of, in the order in which they are tried where none is asked for."""

_BUDGET = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([%kKMGT]?)\s*")
_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def _malformed(metric: str, value: object) -> BudgetError:
    return BudgetError(
        f'{metric} budget {value!r} is malformed, expected a share like "50%", an amount like "1.0G" or "300M", '
        "or a whole number"
    )


def human(count: float) -> str:
    """Return a count with a unit prefix, to four significant digits: 1.039G, 4.775M."""
    if count <= 0:
        return "0"
    power = min(max(int(math.log10(count) // 3), 0), 4)
    scaled = count / 1000**power
    if f"{scaled:.4g}" in ("1000", "1e+03") and power < 4:
        power, scaled = power + 1, scaled / 1000
    return f"{scaled:.4g}" + ["", "k", "M", "G", "T"][power]


def check_multiple(multiple: int | None) -> None:
    """Raise BudgetError unless widths and ranks can be multiples of it; None is for a default."""
    if multiple is not None and multiple < 1:
        raise BudgetError(f"multiple is {multiple}, expected 1 or more units")


def too_coarse(multiple: int, metric: str, target: int) -> BudgetError:
    """Return the error that says that no widths of a multiple come near enough to a target."""
    return BudgetError(
        f"no FFN widths that are multiples of {multiple} come within 0.5% of {target:,} {metric}; use a smaller "
        "multiple or another budget"
    )
