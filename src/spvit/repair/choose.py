"""The choice with the least sum of scores within a budget: a knapsack in which every site takes one of its choices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from spvit.architecture import DEFAULT_MULTIPLE, FFN, KINDS, REPAIRED, Architecture, Attention, Block
from spvit.budget import MULTIPLES, Budget, in_words, least_in_words, tolerance, too_coarse
from spvit.cost import NetworkCost
from spvit.errors import BudgetError
from spvit.hosts.host import Host
from spvit.hosts.sites import BlockSites
from spvit.repair.constraints import Allowed, Constraints
from spvit.repair.errors import Ranking, narrowest
from spvit.repair.objective import Asked
from spvit.repair.scores import BlockScores, Scores
from spvit.repair.unread import patches_unread
from spvit.replacements.costs import network_costs

STEPS_PER_SITE = 512
"""Steps in which costs are counted, for every site, so that rounding takes no more than 1/512 of what may be spent."""


def decide_by_scores(
    host: Host,
    scores: Scores,
    budget: Budget,
    multiple: int | None,
    constraints: Constraints,
    priced: NetworkCost | None = None,
) -> Architecture:
    """Return the architecture with the least sum of scores within a budget and constraints, as `decide` says.

    priced: the costs in the budget's metric, where they are measured.

    Raises:
        BudgetError: the budget cannot be reached; names the smallest cost that can, or the nearest below.
        CalibrationError: the scores are of another model.
        ConstraintError: the constraints name what the host does not have.
    """
    scores.check(host)
    whole = _costs(host, budget, scores.objective, priced)
    target = check_reachable(host, budget, multiple, constraints, scores.blocks, scores.objective, whole)
    prefix, allowed = _under(whole, host, constraints), constraints.at(host)
    multiples, attends = MULTIPLES if multiple is None else (multiple,), _attends(host)
    # The best that is affordable is within tolerance nearly always; where all are below, the rest is spent, in the
    # finest steps, which harm least.
    nearly = math.ceil((1 - tolerance(budget.metric)) * target)
    steps = [*((step, 0) for step in multiples), *((step, nearly) for step in reversed(multiples))]
    costs, found = (prefix, whole)[prefix is whole :], []
    for cost in costs:
        tried = (choose(scores.blocks, cost, target, step, wanted, attends, allowed) for step, wanted in steps)
        landed = (chosen for chosen in tried if chosen is not None and cost.of(chosen) >= nearly)
        if (chosen := next(landed, None)) is not None:
            last = replace(chosen.blocks[-1], tokens="all" if cost is whole else "prefix")
            found.append(replace(chosen, blocks=(*chosen.blocks[:-1], last)))
    if found:
        return min(found, key=lambda architecture: _total(scores.blocks, architecture))
    most: list[list[Choice] | None] = []
    for cost in costs:
        sites = _sites(scores.blocks, cost, multiples[-1], allowed)
        costly = [[(what, spent, -float(spent)) for what, spent, _ in site] for site in sites]
        most += [_least_sum(variant, target - cost.fixed, 0) for variant in _variants(costly, attends)]
    below = whole.fixed + max(_sum(chosen, 1) for chosen in most if chosen is not None)
    share = math.ceil(10025 * below / whole.dense) / 100  # a little more than it costs, as costs are counted in steps
    nearest = f"the nearest below is {in_words(budget.metric, below, exact=True)}, so ask for {share:.2f}%"
    raise BudgetError(f"{too_coarse(multiples[-1], budget.metric, target)}; {nearest}")


def _total(scores: Sequence[BlockScores], architecture: Architecture) -> float:
    """Return the sum of scores of what an architecture keeps."""
    pairs = zip(scores, architecture.blocks)
    return sum(dict(own.attention)[block.attention] + own.ffn[len(block.ffn.units)] for own, block in pairs)


def check_reachable(
    host: Host,
    budget: Budget,
    multiple: int | None,
    constraints: Constraints,
    scores: Sequence[BlockScores] | None = None,
    objective: Asked = "auto",
    priced: NetworkCost | None = None,
) -> int:
    """Return the target in the metric's units. Without scores, what scoring by the objective will find counts.

    Raises:
        BudgetError: nothing costs so little; names the smallest reachable cost, and which constraint to loosen.
        ConstraintError: the constraints name what the host does not have.
    """
    cost = _costs(host, budget, objective, priced)
    target, step = budget.target(cost), MULTIPLES[-1] if multiple is None else multiple
    blocks = scores or [_unscored(block, multiple or DEFAULT_MULTIPLE) for block in host.blocks]

    def smallest(under: Constraints) -> int:
        sites = _sites(blocks, _under(cost, host, under), step, under.at(host))
        dear_first = (sorted(site, key=lambda choice: -choice[1]) for site in sites)
        # Of each kind of attention, and of widths, the cheapest counts.
        least = [list({getattr(choice[0], "kind", ""): choice for choice in site}.values()) for site in dear_first]
        variants = _variants(least, _attends(host))
        return cost.fixed + min(sum(min(spent for _, spent, _ in site) for site in variant) for variant in variants)

    fewest, given = smallest(constraints), constraints.given()
    if target >= fewest:
        return target
    under = f", under {'; '.join(given.values())}" if given else ""
    loosened = [(smallest(replace(constraints, **{name: getattr(Constraints, name)})), name) for name in given]
    loosest, name = min(loosened, default=(0, ""))
    advice = f"; loosen {name}: without it {in_words(budget.metric, loosest)}" if given else ""
    raise BudgetError(
        f"a budget of {in_words(budget.metric, target)} ({target / cost.dense:.1%}) cannot be reached with FFN "
        f"widths that are multiples of {step}{under}: the smallest reachable is "
        f"{least_in_words(cost, fewest)}{advice}"
    )


def _costs(host: Host, budget: Budget, objective: Asked, priced: NetworkCost | None) -> NetworkCost:
    """Return the costs of a host, of prefix tokens alone only where the objective reads no others and it saves some."""
    cost = priced or network_costs(host)[budget.metric]
    if cost.blocks[-1].prefix_only is None or (budget.metric != "params" and patches_unread(host, objective)):
        return cost
    return replace(cost, blocks=(*cost.blocks[:-1], replace(cost.blocks[-1], prefix_only=None)))


def _under(cost: NetworkCost, host: Host, constraints: Constraints) -> NetworkCost:
    """Return the costs of prefix tokens alone in the last block, where they may be under constraints."""
    if constraints.keep_patches or constraints.at(host)[-1].whole:
        return cost
    return cost.for_prefix()


def _unscored(block: BlockSites, multiple: int) -> BlockScores:
    """Return what scores hold of a block's cheapest choices, without the scores."""
    forms, none = (*map(Attention, KINDS), narrowest(block.attention, multiple)), (0.0,) * (block.ffn.units + 1)
    return BlockScores(tuple((kept, 0.0) for kept in forms), Ranking((), none), none)


def _attends(host: Host) -> bool:
    """Return whether some block has to keep attention: nothing else brings the image to a class token."""
    return any(block.attention.prefix_tokens for block in host.blocks)


def choose(
    scores: Sequence[BlockScores],
    cost: NetworkCost,
    target: int,
    multiple: int,
    wanted: int = 0,
    attends: bool = False,
    allowed: Sequence[Allowed] | None = None,
) -> Architecture | None:
    """Return the architecture with the least sum of scores that costs at most the target, or None if none does.

    Dynamic programming over the sites, on costs in whole steps of 1/512 of the target for all sites together, rounded
    up so that the target holds. The cost is at least `wanted` where there is such a choice; with `attends` some block
    keeps attention. `allowed` says what each block may become; None allows everything.
    """
    sites = _sites(scores, cost, multiple, allowed)
    limit, least = target - cost.fixed, wanted - cost.fixed
    chosen = _least_sum(sites, limit, least)
    if chosen is not None and attends and all(attention.kind != "msa" for attention, _, _ in chosen[::2]):
        tried = (_least_sum(variant, limit, least) for variant in _variants(sites, attends))
        found = [choice for choice in tried if choice is not None]
        chosen = min(found, key=lambda choice: (_sum(choice, 1) < least, _sum(choice, 2)), default=None)
    if chosen is None:
        return None
    kept = [what for what, _, _ in chosen]
    blocks = [
        Block(attention, FFN(own.units, tuple(sorted(block.ranking.units[:width]))))
        for attention, width, own, block in zip(kept[::2], kept[1::2], cost.blocks, scores)
    ]
    return Architecture(tuple(blocks), REPAIRED.prefix, REPAIRED.skip)


Choice = tuple[Any, int, float]
"""What an attention layer or an FFN may keep, its cost and its score."""


def _sum(choices: Sequence[Choice], part: int) -> float:
    return sum(choice[part] for choice in choices)


def _variants(sites: Sequence[list[Choice]], attends: bool) -> Iterator[Sequence[list[Choice]]]:
    """Yield the sites; if some block has to attend with one that may only keep attention, each in turn."""
    if not attends:
        yield sites
        return
    for index in range(0, len(sites), 2):
        staying = [choice for choice in sites[index] if choice[0].kind == "msa"]
        yield [*sites[:index], staying, *sites[index + 1 :]]


def _sites(
    scores: Sequence[BlockScores], cost: NetworkCost, multiple: int, allowed: Sequence[Allowed] | None = None
) -> list[list[Choice]]:
    """Return what every attention and FFN in turn may keep."""
    sites: list[list[Choice]] = []
    for block, own, may in zip(scores, cost.blocks, allowed or [Allowed()] * len(scores)):
        offered = [(kept, score) for kept, score in block.attention if kept.kind in own.kinds]
        fitting = [(kept, score) for kept, score in offered if _of_multiple(kept, multiple) and may.takes(kept)]
        sites.append([(kept, own.attention(kept, REPAIRED), score) for kept, score in fitting])
        widths = sorted({*range(multiple, own.units, multiple), own.units} - set(range(may.least_units)))
        sites.append([(width, own.unit * width, block.ffn[width]) for width in widths])
    return sites


def _of_multiple(kept: Attention, multiple: int) -> bool:
    """Return whether the ranks of a layer are multiples of a number."""
    return all(rank is None or rank % multiple == 0 for rank in (kept.query_key_rank, kept.value_rank))


def _least_sum(sites: Sequence[list[Choice]], limit: int, wanted: int) -> list[Choice] | None:
    """Return the choice of every site with the least sum of scores at a sum of costs up to a limit.

    The costs are at least `wanted` where there is such a choice. None when all choices are beyond the limit.
    """
    cheapest = [min(site, key=lambda choice: choice[1:]) for site in sites]
    if limit < _sum(cheapest, 1):
        return None
    best_choices = [min(site, key=lambda choice: (choice[2], choice[1])) for site in sites]
    if wanted <= _sum(best_choices, 1) <= limit:
        return best_choices
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
    chosen: list[Choice] = []
    for site, picks in zip(reversed(sites), reversed(taken)):
        chosen.append(site[int(picks[room])])
        room -= -(-chosen[-1][1] // unit)
    return chosen[::-1]


def _tables(sites: Sequence[list[Choice]], unit: int, room: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the least sum of scores by the exact sum of costs in units, [room + 1], and each site's pick for it."""
    best = torch.full((room + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0
    taken = []
    for site in sites:
        better, picks = torch.full_like(best, torch.inf), torch.zeros(room + 1, dtype=torch.int32)
        for pick, (_, cost, loss) in enumerate(site):
            steps = -(-cost // unit)
            if steps <= room:
                reached, own = better[steps:], best[: room + 1 - steps] + loss
                picks[steps:][own < reached] = pick
                torch.minimum(reached, own, out=reached)
        best = better
        taken.append(picks)
    return best, taken
