"""Where the gates of a search start when scores of the candidates are known: at what a unit of the budget is worth.

A budget puts a price on a MAC (or parameter): the one at which the choices of least score + price x cost together cost
the budget. A gate starts at the logarithm of what it buys in score over what that costs at this price, so it is open
if it is worth its price, the more surely the more it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spvit.architecture import Attention
from spvit.cost import BlockCost, parse_budget
from spvit.hosts import family_of
from spvit.repair import PREFIX_RULE, SKIP_RULE
from spvit.scores import BlockScores, score
from spvit.surgery import NotSearchableError, gated_layers, search_record

LARGEST = 3.0
"""Bound of a logit, at which a gate is drawn against its decision once in twenty times."""
BISECTIONS = 60

Choices = Sequence[tuple[float, float]]
"""(cost, score) of the choices of one site, in the order of its nested gates."""


def initialise_gates(
    net: nn.Module,
    host: nn.Module,
    *,
    macs: str | int | None = None,
    params: str | int | None = None,
    calibration: Tensor | Iterable[Any],
    report: Callable[[int, int], object] | None = None,
) -> None:
    """Set the gates of a calibrated searchable network, in place, to where candidates' scores and a budget put them.

    Args:
        net: what `make_searchable(host, calibration=...)` returned.
        host: the dense model that it was made from.
        macs: budget: `"50%"` of the host's cost, `"1.0G"` or a whole number.
        params: the same in parameters; give exactly one of the two.
        calibration: images as in `decide`.
        report: called with (blocks scored, blocks) after each.

    Raises:
        NotSearchableError: the network is not searchable, or not calibrated.
        BudgetError: the budget is malformed, or no choice costs that.
        CalibrationError: the calibration images do not fit the host, are too few, or give values that are not finite.
    """
    layers, record = gated_layers(net), search_record(net)
    if not record.calibrated:
        raise NotSearchableError(
            "scores are of repaired candidates, which this searchable network does not have; make it with "
            "spvit.make_searchable(host, calibration=images)"
        )
    budget = parse_budget(macs, params)
    cost = record.costs[budget.metric]
    target = budget.target(cost)
    ranks = [() if gates is None else gates.ranks for gates in (attention.rank_gates() for attention, _ in layers)]
    widest = max(own.head_width for own in cost.blocks)  # as a step it leaves no narrow attention to be scored
    steps = {low for chosen in ranks for low in chosen[:1]}
    scores = score(host, family_of(host), calibration, min(steps, default=max(widest, 1)), report)
    sites: list[Choices] = []
    for block, own, chosen in zip(scores, cost.blocks, ranks):
        sites.append(attention_choices(block, own, chosen))
        sites.append([(own.unit * width, value) for width, value in enumerate(block.ffn)])
    value = price(sites, target - cost.fixed)
    starts = [logits_of_choices(choices, value) for choices in sites]
    with torch.no_grad():
        for (attention, ffn), block, kinds, widths in zip(layers, scores, starts[::2], starts[1::2]):
            attention.gate_logits.copy_(torch.tensor(kinds[:3]))
            gates = attention.rank_gates()
            if gates is not None:
                gates.gate_logits.copy_(torch.tensor(kinds[3:]))
            units = torch.tensor(block.ranking.units, device=ffn.gate_logits.device)
            ffn.gate_logits[units] = ffn.gate_logits.new_tensor(widths)


def attention_choices(scores: BlockScores, cost: BlockCost, ranks: Sequence[int]) -> Choices:
    """Return (cost, score) of skip, conv1, conv3 and attention, which comes at ascending ranks if there are any."""
    known = dict(scores.attention)
    kept = [Attention("skip"), Attention("conv1"), Attention("conv3")]
    kept += [Attention.narrow(rank) for rank in ranks[:-1]]
    kept.append(Attention())
    return [(cost.attention_kept(item, PREFIX_RULE, SKIP_RULE), known[item]) for item in kept]


def price(sites: Sequence[Choices], target: float) -> float:
    """Return the price at which the choices of least score + price x cost cost the target together, or next to it.

    Zero when the choices of least score cost less.
    """

    def spent(price: float) -> float:
        return sum(min(choices, key=lambda choice: (choice[1] + price * choice[0], choice[0]))[0] for choices in sites)

    if spent(0.0) <= target:
        return 0.0
    cheapest = sum(min(cost for cost, _ in choices) for choices in sites)
    high = 1.0
    while spent(high) > max(target, cheapest):
        high *= 2
    low = 0.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > target else (low, middle)
    return high


def logits_of_choices(choices: Choices, price: float) -> list[float]:
    """Return a logit for each nested gate between the choices of a site: gate j opens the way from choice j on.

    Of the best choices on both sides of a gate, at a price, it is the logarithm of what the further one gains in score
    over what it costs more, bounded. It is positive exactly if the further one is the better.
    """

    def best(among: Choices) -> tuple[float, float]:
        return min(among, key=lambda choice: choice[1] + price * choice[0])

    before = list(itertools.accumulate(choices, lambda found, choice: best([found, choice])))
    after = list(itertools.accumulate(reversed(choices), lambda found, choice: best([found, choice])))[::-1]
    logits = []
    for (cost_before, score_before), (cost_after, score_after) in zip(before, after[1:]):
        gain, spent = score_before - score_after, price * (cost_after - cost_before)
        if gain > 0 and spent > 0:
            logit = math.log(gain) - math.log(spent)
        elif gain < 0 and spent < 0:
            logit = math.log(-spent) - math.log(-gain)
        else:
            logit = math.copysign(math.inf, gain - spent)
        logits.append(max(-LARGEST, min(LARGEST, logit)))
    return logits
