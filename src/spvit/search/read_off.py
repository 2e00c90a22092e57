"""Which architecture the gates of a searched network choose, and its FFN widths at a budget."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from spvit.architecture import FFN, Architecture, Attention, Block
from spvit.budget import MULTIPLES, TOLERANCE, Budget, in_words, least_in_words, too_coarse
from spvit.cost import NetworkCost
from spvit.errors import BudgetError
from spvit.search.gates import is_open
from spvit.search.network import gated_layers, search_record


def check_counted(budget: Budget) -> None:
    """Raise BudgetError for a latency budget: the loss of a search is a sum of costs, which latency is not."""
    if budget.metric == "latency":
        raise BudgetError(
            "a latency budget binds decisions by scores, but the gates of a search learn with MACs or parameters: give "
            "macs or params, or decide for the dense host by scores"
        )


def decide_by_gates(net: nn.Module, budget: Budget | None, multiple: int | None) -> Architecture:
    """Return the architecture that the gates of a searched network choose, as `decide` says.

    Raises:
        BudgetError: the budget cannot be reached; names the smallest or largest cost that can.
        NotSearchableError: the network has no gates.
    """
    layers = gated_layers(net)
    kept = [Attention(attention.decided()) for attention, _ in layers]
    logits = [ffn.gate_logits.detach().float().cpu() for _, ffn in layers]
    if budget is None:
        widths = [_rounded(int(is_open(item).sum()), len(item), multiple or 1) for item in logits]
        return _architecture(kept, logits, widths)
    check_counted(budget)
    cost = search_record(net).costs[budget.metric]
    attention = sum(block.attention(item) for block, item in zip(cost.blocks, kept))
    multiples = MULTIPLES if multiple is None else (multiple,)
    for candidate in multiples:
        found = _widths_at_budget(cost, budget, attention, logits, candidate)
        if found is not None:
            return _architecture(kept, logits, found)
    raise too_coarse(multiples[-1], budget.metric, budget.target(cost))


def _widths_at_budget(
    cost: NetworkCost, budget: Budget, attention: int, logits: Sequence[Tensor], multiple: int
) -> list[int] | None:
    """Return FFN widths for which the cost is within tolerance of the budget, or None when steps are too coarse.

    What the attention layers cost is given.

    All blocks share one threshold on the gate logits. Lowering it opens groups of `multiple` units, each at the logit
    of the unit in its middle, which is rounding to the nearest multiple; ties go evenly over the blocks.
    """
    target = budget.target(cost)
    widths = [min(multiple, len(item)) for item in logits]
    spent = cost.fixed + attention
    smallest = spent + sum(block.unit * width for block, width in zip(cost.blocks, widths))
    largest = spent + sum(block.unit * block.units for block in cost.blocks)
    slack = TOLERANCE * target
    for bound, word, reached in (
        (smallest, "smallest", target >= smallest - slack),
        (largest, "largest", target <= largest + slack),
    ):
        if not reached:
            raise BudgetError(
                f"a budget of {in_words(budget.metric, target)} ({target / cost.dense:.1%}) cannot be reached with the "
                f"attention layers that the gates keep: the {word} reachable is "
                f"{least_in_words(cost, bound)}; "
                "search longer or with a larger budget weight, or ask for that"
            )
    groups = []
    for index, item in enumerate(logits):
        descending = item.sort(descending=True).values.tolist()
        edges = [*range(widths[index], len(item), multiple), len(item)]
        for low, high in itertools.pairwise(edges):
            groups.append((-descending[(low + high) // 2], high / len(item), index, high - low))
    states = [(smallest, list(widths))]
    for _, _, index, count in sorted(groups):
        if states[-1][0] >= target:
            break
        widths[index] += count
        states.append((states[-1][0] + cost.blocks[index].unit * count, list(widths)))
    within = [state for state in states if abs(state[0] - target) <= slack]
    if not within:
        return None
    return max(within, key=lambda state: (state[0] <= target, -abs(state[0] - target)))[1]


def _rounded(count: int, width: int, multiple: int) -> int:
    return min(width, max(min(multiple, width), round(count / multiple) * multiple)) if multiple > 1 else count


def _architecture(kept: Sequence[Attention], logits: Sequence[Tensor], widths: Sequence[int]) -> Architecture:
    blocks = []
    for attention, item, width in zip(kept, logits, widths):
        best = item.sort(descending=True, stable=True).indices[:width]
        blocks.append(Block(attention, FFN(len(item), tuple(sorted(best.tolist())))))
    return Architecture(tuple(blocks))
