"""MACs and parameters of a network by what its blocks keep, and budgets.

One table of costs serves architectures (integers) and the expectation of gates (tensors). Costs are MACs of one image,
or parameters, of the deployed network (batch norms folded).
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from spvit.architecture import Architecture, Attention, Block

METRICS = ("macs", "params")


class BudgetError(ValueError):
    """A budget is malformed, or cannot be reached."""


@dataclass(frozen=True)
class BlockCost:
    """What the parts of one block cost, in MACs or parameters."""

    msa: int
    conv3: int
    conv1: int
    unit: int
    """One hidden unit of the FFN."""
    units: int
    """Hidden units of the FFN before pruning."""
    heads: int = 0
    """Heads of the attention before pruning."""
    head_width: int = 0
    """Dimensions of a head before pruning."""
    query_key: int = 0
    """One dimension of the queries and keys of one head."""
    value: int = 0
    """One dimension of the values of one head."""
    prefix_rules: Mapping[str, int] = field(default_factory=dict)
    """What rules for prefix tokens add to a convolution."""
    skip_rules: Mapping[str, int] = field(default_factory=dict)
    """What rules for skipped layers cost."""

    def attention(self, kind: str) -> int:
        """Return the cost of an attention kind, with all heads and dimensions, and rules that cost nothing."""
        return {"msa": self.msa, "conv3": self.conv3, "conv1": self.conv1, "skip": 0}[kind]

    def attention_kept(self, attention: Attention, prefix_rule: str = "identity", skip_rule: str = "zero") -> int:
        """Return the cost of what stands where the attention layer was."""
        if attention.kind == "skip":
            return self.skip_rules.get(skip_rule, 0)
        if attention.kind != "msa":
            return self.attention(attention.kind) + self.prefix_rules.get(prefix_rule, 0)
        heads = self.heads if attention.heads is None else len(attention.heads)
        query_key = self.head_width if attention.query_key_rank is None else attention.query_key_rank
        value = self.head_width if attention.value_rank is None else attention.value_rank
        removed = self.heads * self.head_width * (self.query_key + self.value)
        return self.msa - removed + heads * (query_key * self.query_key + value * self.value)

    def kept(self, block: Block, prefix_rule: str, skip_rule: str) -> int:
        """Return the cost of what an architecture keeps of the block."""
        return self.attention_kept(block.attention, prefix_rule, skip_rule) + self.unit * len(block.ffn.units)


@dataclass(frozen=True)
class NetworkCost:
    """What a network costs: a fixed part, and what each block's gates decide (paper section 3.4)."""

    metric: str
    """`macs` or `params`."""
    fixed: int
    blocks: tuple[BlockCost, ...]

    def of(self, architecture: Architecture) -> int:
        """Return the cost of an architecture."""
        rules = (architecture.prefix_rule, architecture.skip_rule)
        return self.fixed + sum(cost.kept(block, *rules) for cost, block in zip(self.blocks, architecture.blocks))

    def expected(
        self,
        attention: Tensor,
        units: Sequence[Tensor],
        ranks: Sequence[tuple[Sequence[int], Tensor] | None] | None = None,
        prefix_rule: str = "identity",
        skip_rule: str = "zero",
    ) -> Tensor:
        """Return the cost of gates given in expectation, differentiable.

        Args:
            attention: nested expected gates, [blocks, 3].
            units: for each block, the sum of its expected FFN gates, a scalar.
            ranks: for each block whose attention may be narrower, the ranks that may stay, ascending, and the nested
                expected gates of all but the smallest, [ranks - 1].
            prefix_rule: of the convolutions.
            skip_rule: of the layers with all gates closed.
        """
        steps, closed = [], 0
        for index, block in enumerate(self.blocks):
            narrow = ranks[index] if ranks is not None else None
            smallest = Attention() if narrow is None else Attention.narrow(narrow[0][0])
            kinds = (Attention("skip"), Attention("conv1"), Attention("conv3"), smallest)
            spent = [block.attention_kept(kept, prefix_rule, skip_rule) for kept in kinds]
            closed += spent[0]
            steps.append([high - low for low, high in itertools.pairwise(spent)])
        unit = attention.new_tensor([block.unit for block in self.blocks])
        total = self.fixed + closed + (attention.new_tensor(steps) * attention).sum()
        for block, nested, narrow in zip(self.blocks, attention, ranks or ()):
            if narrow is not None:
                spent = [block.attention_kept(Attention.narrow(rank)) for rank in narrow[0]]
                wider = attention.new_tensor([high - low for low, high in itertools.pairwise(spent)])
                total = total + nested[-1] * (wider * narrow[1]).sum()
        return total + (unit * torch.stack(list(units))).sum()

    @property
    def smallest(self) -> int:
        """The least cost that any architecture can have: no attention, no FFN units."""
        return self.fixed

    @property
    def dense(self) -> int:
        """The cost of keeping everything."""
        return self.fixed + sum(block.msa + block.unit * block.units for block in self.blocks)


def count_macs(model: nn.Module, run: Callable[[nn.Module], object]) -> int:
    """Return the MACs that a forward pass takes, measured without computing anything.

    Linear, convolution and attention products count, as `torch.utils.flop_counter` counts them (halved).

    Args:
        model: any module; it is copied to the meta device, since fused attention on CPU escapes the counter.
        run: calls the copy it is given once.
    """
    # Without gradients to track, the counter also accepts blocks that attend to a learned query.
    twin = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(twin)
    return counter.get_total_flops() // 2


def count_params(model: nn.Module) -> int:
    """Return the number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def check_multiple(multiple: int | None) -> None:
    """Raise BudgetError unless widths and ranks can be multiples of it; None is for a default."""
    if multiple is not None and multiple < 1:
        raise BudgetError(f"multiple is {multiple}, expected 1 or more units")


@dataclass(frozen=True)
class Budget:
    """How much of a metric a network may cost: a fraction of the dense cost, or an amount."""

    metric: str
    fraction: float | None = None
    amount: int | None = None

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


_BUDGET = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([%kKMGT]?)\s*")
_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_budget(macs: str | int | None = None, params: str | int | None = None) -> Budget:
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
    amount = number * _UNITS[unit]
    if amount.denominator != 1 or amount < 1:
        raise _malformed(metric, value)
    return Budget(metric, amount=int(amount))


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
