"""Which architecture to keep within a budget: as the gates of a search say, or by scores from calibration images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spvit.architecture import DEFAULT_MULTIPLE, FFN, Architecture, Attention, Block
from spvit.budget import Budget, check_multiple, human, parse_budget
from spvit.cost import NetworkCost
from spvit.errors import BudgetError
from spvit.gates import is_open
from spvit.hosts import family_of
from spvit.hosts.base import network_costs
from spvit.repair import PREFIX_RULE, SKIP_RULE
from spvit.scores import BlockScores, score
from spvit.surgery import gated_layers, search_record

TOLERANCE = 0.005
STEPS_PER_SITE = 512
"""Steps in which costs are counted, for every site, so that rounding takes no more than 1/512 of what may be spent."""


def decide(
    net: nn.Module,
    *,
    macs: str | int | None = None,
    params: str | int | None = None,
    multiple: int | None = None,
    calibration: Tensor | Iterable[Any] | None = None,
    report: Callable[[int, int], object] | None = None,
) -> Architecture:
    """Return the architecture that the gates of a searchable network choose, or the one with the best scores.

    From gates, without a budget, it is exactly what the network computes in evaluation mode. With one, attention stays
    as the gates say and the threshold on the FFN gates is shifted until the cost is within 0.5 % of the budget.

    With calibration images nothing is searched: `net` is a dense host, every candidate of every site is scored by how
    little the outputs diverge from the dense ones after its repair, and the choice with the least sum of scores under
    the budget is taken, narrow attention included. Prune to it with `repair=` the same images.

    Args:
        net: what `make_searchable` returned, searched; or a dense host, with calibration images.
        macs: budget: `"50%"` of the host's cost, `"1.0G"` or a whole number.
        params: the same in parameters; give at most one of the two.
        multiple: FFN widths, and ranks of attention, are multiples of it. Default: with a budget 8, or the largest of
            4, 2, 1 that lands within 0.5 % where 8 is too coarse (very small hosts); without a budget 1.
        calibration: unlabelled images, a few hundred or more: a tensor [images, channels, height, width], or batches.
            About 350 are used, or more of small ones, taken evenly from all of them.
        report: with calibration images, called with (blocks scored, blocks) after each.

    Raises:
        BudgetError: the budget is malformed, or cannot be reached; names the smallest or largest cost that can.
        CalibrationError: the calibration images do not fit the host, are too few, or give values that are not finite.
    """
    check_multiple(multiple)
    if calibration is not None:
        return _decide_by_scores(net, parse_budget(macs, params), multiple, calibration, report)
    layers, record = gated_layers(net), search_record(net)
    kept = [Attention(attention.decided()) for attention, _ in layers]
    logits = [ffn.gate_logits.detach().float().cpu() for _, ffn in layers]
    if macs is None and params is None:
        widths = [_rounded(int(is_open(item).sum()), len(item), multiple or 1) for item in logits]
        return _architecture(kept, logits, widths)
    budget = parse_budget(macs, params)
    cost = record.costs[budget.metric]
    attention = sum(block.attention_kept(item) for block, item in zip(cost.blocks, kept))
    multiples = _multiples(multiple)
    for candidate in multiples:
        found = _widths_at_budget(cost, budget, attention, logits, candidate)
        if found is not None:
            return _architecture(kept, logits, found)
    raise _too_coarse(multiples[-1], budget, cost)


def _multiples(multiple: int | None) -> list[int]:
    return [DEFAULT_MULTIPLE, 4, 2, 1] if multiple is None else [multiple]


def _too_coarse(multiple: int, budget: Budget, cost: NetworkCost) -> BudgetError:
    return BudgetError(
        f"no FFN widths that are multiples of {multiple} come within 0.5% of {budget.target(cost):,} "
        f"{budget.metric}; use a smaller multiple or another budget"
    )


def _decide_by_scores(
    host: nn.Module,
    budget: Budget,
    multiple: int | None,
    images: Tensor | Iterable[Any],
    report: Callable[[int, int], object] | None,
) -> Architecture:
    family = family_of(host)
    cost = network_costs(family, host)[budget.metric]
    target = budget.target(cost)
    multiples = _multiples(multiple)
    scores = score(host, family, images, multiples[0], report)
    # Nothing but attention brings the image to a class token.
    attends = any(block.attention.prefix_tokens for block in family.blocks(host))
    # The best that is affordable is within tolerance nearly always; where all are below, the rest is spent, in the
    # finest steps, which harm least.
    nearly = math.ceil((1 - TOLERANCE) * target)
    for candidate, wanted in [*((step, 0) for step in multiples), *((step, nearly) for step in reversed(multiples))]:
        chosen = choose(scores, cost, target, candidate, wanted, attends)
        if chosen is not None and abs(cost.of(chosen) - target) <= TOLERANCE * target:
            return chosen
    sites = _sites(scores, cost, multiples[-1])
    smallest = cost.fixed + min(
        sum(min(spent for spent, _ in site) for _, site in variant)
        for variant in (_attending(sites) if attends else [sites])
    )
    if target < smallest:
        raise BudgetError(
            f"a budget of {human(target)} {budget.metric} ({target / cost.dense:.1%}) cannot be reached with FFN "
            f"widths that are multiples of {multiples[-1]}: the smallest reachable is {human(smallest)} "
            f"({smallest / cost.dense:.1%}, {smallest:,} {budget.metric})"
        )
    raise _too_coarse(multiples[-1], budget, cost)


def choose(
    scores: Sequence[BlockScores],
    cost: NetworkCost,
    target: int,
    multiple: int,
    wanted: int = 0,
    attends: bool = False,
) -> Architecture | None:
    """Return the architecture with the least sum of scores that costs at most the target, or None if none does.

    Dynamic programming over the sites, on costs in whole steps of 1/512 of the target for all sites together, rounded
    up so that the target holds.

    Args:
        scores: of every block.
        cost: the host's, in the target's metric.
        target: MACs or parameters.
        multiple: FFN widths are multiples of it, or all units.
        wanted: the cost is to be at least this where there is such a choice.
        attends: at least one block is to keep attention.
    """
    sites = _sites(scores, cost, multiple)
    limits = (target - cost.fixed, wanted - cost.fixed)
    chosen = _chosen(sites, *limits)
    if chosen is not None and attends and all(attention.kind != "msa" for attention in chosen.kept[::2]):
        found = [choice for variant in _attending(sites) if (choice := _chosen(variant, *limits)) is not None]
        chosen = min(found, key=lambda choice: (choice.cost < limits[1], choice.score), default=None)
    if chosen is None:
        return None
    blocks = [
        Block(attention, FFN(own.units, tuple(sorted(block.ranking.units[:width]))))
        for attention, width, own, block in zip(chosen.kept[::2], chosen.kept[1::2], cost.blocks, scores)
    ]
    return Architecture(tuple(blocks), PREFIX_RULE, SKIP_RULE)


Site = tuple[list[Any], list[tuple[int, float]]]
"""What an attention layer or an FFN may keep, and the (cost, score) of that."""


@dataclass(frozen=True)
class _Choice:
    """What every site keeps, and the sums of its costs and scores."""

    kept: list[Any]
    cost: int
    score: float


def _chosen(sites: Sequence[Site], limit: int, wanted: int) -> _Choice | None:
    """Return the choice with the least sum of scores, as `_least_sum` takes it, or None."""
    picks = _least_sum([site for _, site in sites], limit, wanted)
    if picks is None:
        return None
    taken = [site[pick] for (_, site), pick in zip(sites, picks)]
    kept = [choices[pick] for (choices, _), pick in zip(sites, picks)]
    return _Choice(kept, sum(cost for cost, _ in taken), sum(score for _, score in taken))


def _attending(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Yield the sites with one attention layer that may only keep attention, each in turn."""
    for index in range(0, len(sites), 2):
        choices, site = sites[index]
        staying = [number for number, kept in enumerate(choices) if kept.kind == "msa"]
        own = ([choices[number] for number in staying], [site[number] for number in staying])
        yield [*sites[:index], own, *sites[index + 1 :]]


def _sites(scores: Sequence[BlockScores], cost: NetworkCost, multiple: int) -> list[Site]:
    """Return, for every attention and FFN in turn, what it may keep and the (cost, score) of that."""
    sites: list[Site] = []
    for block, own in zip(scores, cost.blocks):
        attention = [(own.attention_kept(kept, PREFIX_RULE, SKIP_RULE), score) for kept, score in block.attention]
        sites.append(([kept for kept, _ in block.attention], attention))
        widths = sorted({*range(multiple, own.units, multiple), own.units})
        sites.append((list(widths), [(own.unit * width, block.ffn[width]) for width in widths]))
    return sites


def _least_sum(sites: Sequence[Sequence[tuple[int, float]]], limit: int, wanted: int) -> list[int] | None:
    """Return which (cost, score) of every site to take for the least sum of scores at a sum of costs up to a limit.

    The costs are to be at least `wanted` where there is such a choice. None when all choices are beyond the limit.
    """
    cheapest = [min(range(len(site)), key=lambda pick: site[pick]) for site in sites]
    if limit < sum(site[pick][0] for site, pick in zip(sites, cheapest)):
        return None
    best_picks = [min(range(len(site)), key=lambda pick: site[pick][::-1]) for site in sites]
    if wanted <= sum(site[pick][0] for site, pick in zip(sites, best_picks)) <= limit:
        return best_picks
    unit = max(1, limit // (STEPS_PER_SITE * len(sites)))
    room = limit // unit
    best = torch.full((room + 1,), torch.inf, dtype=torch.float64)  # by the exact sum of the rounded costs
    best[0] = 0
    taken = []
    for site in sites:
        better, choice = torch.full_like(best, torch.inf), torch.zeros(room + 1, dtype=torch.int32)
        for pick, (cost, loss) in enumerate(site):
            steps = -(-cost // unit)
            if steps <= room:
                reached, own = better[steps:], best[: room + 1 - steps] + loss
                choice[steps:][own < reached] = pick
                torch.minimum(reached, own, out=reached)
        best = better
        taken.append(choice)
    # Rounded up, costs seem larger than they are.
    low = max(0, -(-wanted // unit))
    slack = min(len(sites), (room - low) // 2) if unit > 1 else 0
    for start in (low + slack, low, 0):
        if best[start:].isfinite().any():
            room = start + int(best[start:].argmin())
            break
    else:
        return cheapest  # which fit, but for the rounding
    picks: list[int] = []
    for site, choice in zip(reversed(sites), reversed(taken)):
        pick = int(choice[room])
        picks.append(pick)
        room -= -(-site[pick][0] // unit)
    return picks[::-1]


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
                f"a budget of {human(target)} {budget.metric} ({target / cost.dense:.1%}) cannot be reached with the "
                f"attention layers that the gates keep: the {word} reachable is {human(bound)} "
                f"({bound / cost.dense:.1%}, {bound:,} {budget.metric}); "
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
