"""The choice with the least sum of scores within a budget: a knapsack in which every site takes one of its choices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spvit.architecture import FFN, REPAIRED, Architecture, Attention, Block
from spvit.budget import MULTIPLES, TOLERANCE, Budget, human, too_coarse
from spvit.cost import NetworkCost
from spvit.errors import BudgetError
from spvit.hosts.host import Host
from spvit.repair.scores import BlockScores, Scores
from spvit.replacements.costs import network_costs

STEPS_PER_SITE = 512
"""Steps in which costs are counted, for every site, so that rounding takes no more than 1/512 of what may be spent."""


def decide_by_scores(host: Host, scores: Scores, budget: Budget, multiple: int | None = None) -> Architecture:
    """Return the architecture with the least sum of scores within a budget, as `decide` says.

    Raises:
        BudgetError: the budget cannot be reached; names the smallest cost that can.
        CalibrationError: the scores are of another model.
    """
    scores.check(host)
    cost = network_costs(host)[budget.metric]
    target = budget.target(cost)
    multiples = MULTIPLES if multiple is None else (multiple,)
    # Nothing but attention brings the image to a class token.
    attends = any(block.attention.prefix_tokens for block in host.blocks)
    # The best that is affordable is within tolerance nearly always; where all are below, the rest is spent, in the
    # finest steps, which harm least.
    nearly = math.ceil((1 - TOLERANCE) * target)
    for candidate, wanted in [*((step, 0) for step in multiples), *((step, nearly) for step in reversed(multiples))]:
        chosen = choose(scores.blocks, cost, target, candidate, wanted, attends)
        if chosen is not None and abs(cost.of(chosen) - target) <= TOLERANCE * target:
            return chosen
    sites = _sites(scores.blocks, cost, multiples[-1])
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
    raise too_coarse(multiples[-1], budget.metric, target)


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
    up so that the target holds. The cost is at least `wanted` where there is such a choice; with `attends` some block
    keeps attention.
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
    return Architecture(tuple(blocks), REPAIRED.prefix, REPAIRED.skip)


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
        fitting = [(kept, score) for kept, score in block.attention if _of_multiple(kept, multiple)]
        attention = [(own.attention(kept, REPAIRED), score) for kept, score in fitting]
        sites.append(([kept for kept, _ in fitting], attention))
        widths = sorted({*range(multiple, own.units, multiple), own.units})
        sites.append((list(widths), [(own.unit * width, block.ffn[width]) for width in widths]))
    return sites


def _of_multiple(kept: Attention, multiple: int) -> bool:
    """Return whether the ranks of a layer are multiples of a number."""
    return all(rank is None or rank % multiple == 0 for rank in (kept.query_key_rank, kept.value_rank))


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
    best, taken = _tables(sites, unit, room)
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


def _tables(
    sites: Sequence[Sequence[tuple[int, float]]], unit: int, room: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the least sum of scores by the exact sum of costs in units, [room + 1], and each site's choice for it."""
    best = torch.full((room + 1,), torch.inf, dtype=torch.float64)
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
    return best, taken
