"""What each choice misses of a dense layer's output after its repair, in closed form, for every choice at once.

Narrower attention takes a pass of the images for every query/key rank; the rest follows from moments. With S the
covariance of the outputs of all heads, rotated so that fewer of their dimensions are the first ones, and B the output
projection that the repair fits to the dense layer's output y, what is left is tr(cov(y)) - 2 tr(B S_xy) + tr(B S B^T).

Heads and FFN units then leave by backward elimination (optimal brain surgeon for a linear layer). With H the inverse
covariance of the inputs that are left and W their weights as repaired so far, giving up the set R costs
tr(W_R H_RR^-1 W_R^T), and leaves W_K - W_R H_RR^-1 H_RK and H_KK - H_KR H_RR^-1 H_RK. For example two inputs of
variance 1 and covariance c: H_11 = 1 / (1 - c^2), so giving up the first costs w_1^2 (1 - c^2), what the second cannot
tell of it, and adds c w_1 to the second's weight.

Shapes: K inputs of a linear layer (an FFN's hidden units, or V dimensions of each of H heads), E head width, D outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spvit.architecture import Attention
from spvit.hosts.sites import AttentionSite
from spvit.hosts.walk import BlockPair
from spvit.moments import Moments, cholesky, ridge_for
from spvit.replacements.narrow import (
    fitted_output,
    inputs_of_attention,
    narrow_values,
    own_covariances,
    rotated_queries,
    value_directions,
)

MOST_RANKS = 7
"""Ranks below the head width of which all pairs are considered: in finer steps neighbours hardly differ."""
STEPS = 64
"""Groups at most in which FFN units leave."""


def paired_ranks(ranks: Sequence[int]) -> list[int]:
    """Return at most seven of some ascending ranks, evenly spread, the last among them."""
    if len(ranks) <= MOST_RANKS:
        return list(ranks)
    return [ranks[-1 - index * len(ranks) // MOST_RANKS] for index in reversed(range(MOST_RANKS))]


def narrowest(site: AttentionSite, multiple: int) -> Attention:
    """Return the narrowest layer that `attention_errors` knows at a site, of ranks that are multiples of a number."""
    ranks = paired_ranks(range(multiple, site.head_width, multiple))
    queries, values = (ranks[0] if may and ranks else None for may in (site.narrows_queries, site.narrows_values))
    return Attention("msa", (0,) if site.narrows_values and site.heads > 1 else None, queries, values)


def attention_errors(pair: BlockPair, ranks: Sequence[int], metric: Tensor) -> dict[Attention, float]:
    """Return how much of a dense attention layer's output each narrower layer misses after its repair.

    That is the mean of |R d|^2 over tokens, d being what is missed. The whole layer is left out; nothing is returned
    for a layer that cannot be narrowed.

    Args:
        pair: a dense block, and the inputs that repairs are fitted to.
        ranks: that queries and keys, and values, may have beside all dimensions, ascending.
        metric: R, [D, D].
    """
    site = pair.sites.attention
    if not (site.narrows_queries or site.narrows_values):
        return {}
    fewest = 1 if site.narrows_values else site.heads
    wanted, second_moment = Moments(), inputs_of_attention(pair)
    for out in pair.wanted(site.path):
        wanted.add(out @ metric.T.to(out))
    total = float(wanted.products(pair.host.weights(pair.index).out_bias is not None)[0].trace())
    errors: dict[Attention, float] = {}
    for query_key_rank in (*(ranks if site.narrows_queries else ()), None):
        values = (None, *(ranks if site.narrows_values else ()))
        fits = _value_fits(pair, Attention(query_key_rank=query_key_rank), values, second_moment, total, metric)
        for value_rank, (left, ranking) in fits.items():
            for count in range(fewest, site.heads + 1):
                kept = tuple(sorted(ranking.units[:count])) if count < site.heads else None
                errors[Attention("msa", kept, query_key_rank, value_rank)] = left + ranking.errors[count]
    del errors[Attention()]
    return errors


def _value_fits(
    pair: BlockPair,
    queries: Attention,
    value_ranks: Sequence[int | None],
    second_moment: Tensor,
    total: float,
    metric: Tensor,
) -> dict[int | None, tuple[float, Ranking]]:
    """Return by value rank what all heads miss of the dense output, and what is missed beyond that as heads leave.

    total: of the dense layer's output, by the metric.
    """
    heads = pair.sites.attention.heads
    weights, moments = rotated_queries(pair, queries, second_moment)
    covariances = own_covariances(moments, heads)
    directions = value_directions(weights, covariances)
    all_covariance, all_cross = moments.products(weights.out_bias is not None)
    fits = {}
    for value_rank in value_ranks:
        narrow, covariance, cross = weights, all_covariance, all_cross
        if value_rank is not None:
            narrow, by_head = narrow_values(weights, directions, Attention(value_rank=value_rank), covariances)
            rotation = torch.block_diag(*by_head)
            covariance, cross = rotation @ covariance @ rotation.T, rotation @ cross
        out = fitted_output(narrow.out_weight.flatten(1).double(), covariance, cross, moments)  # [D, H V]
        seen, crossed = metric @ out, cross @ metric.T
        left = total - 2 * float((seen.T * crossed).sum()) + float((seen.T * (covariance @ seen.T)).sum())
        ranking = rank_heads(covariance, seen, heads, ridge_for(moments, len(covariance)))
        fits[value_rank] = (max(left, 0.0), ranking)
    return fits


@dataclass(frozen=True)
class Ranking:
    """The order in which inputs are given up, and what is lost then."""

    units: tuple[int, ...]
    """All inputs or, of heads, all heads, the most needed first."""
    errors: tuple[float, ...]
    """By how many are kept, from none to all: the mean squared error of the outputs, summed over them, after repair."""


class _Left:
    """The inputs of a linear layer that are left: their inverse covariance and their repaired weights."""

    def __init__(self, covariance: Tensor, out_weight: Tensor, ridge: float) -> None:
        self.inverse = torch.cholesky_inverse(cholesky(covariance.double(), ridge))
        self.weight = out_weight.detach().double()

    def give_up(self, going: Tensor, staying: Tensor) -> float:
        """Leave inputs [K'] out, of which the others make up what they can; return what is lost."""
        factor = torch.linalg.cholesky(self.inverse[going][:, going])
        inner = torch.cholesky_solve(self.weight[:, going].T, factor).T
        lost = float((inner * self.weight[:, going]).sum())
        self.weight = self.weight[:, staying] - inner @ self.inverse[going][:, staying]
        solved = torch.cholesky_solve(self.inverse[going][:, staying], factor)
        self.inverse = self.inverse[staying][:, staying] - self.inverse[staying][:, going] @ solved
        return lost


def rank_units(covariance: Tensor, out_weight: Tensor, ridge: float) -> Ranking:
    """Return a ranking of units: they leave in up to 64 groups, those with the least loss taken alone first.

    covariance: of the units, [K, K]; out_weight: [D, K]; ridge: relative to the mean variance.
    """
    units = len(covariance)
    kept = _Left(covariance, out_weight, ridge)
    left = torch.arange(units, device=covariance.device)
    size = max(1, units // STEPS)
    removed: list[int] = []
    errors = [0.0]
    while len(left):
        alone = kept.weight.square().sum(0) / kept.inverse.diagonal()
        order = alone.argsort()
        going, staying = order[:size], order[size:].sort().values
        lost = kept.give_up(going, staying)
        removed += left[going].tolist()
        # Within a group the loss is shared out evenly; widths are multiples of a group in large layers anyway.
        base = errors[-1]
        errors += [base + lost * (index + 1) / len(going) for index in range(len(going))]
        left = left[staying]
    return Ranking(tuple(reversed(removed)), tuple(reversed(errors)))


def rank_heads(covariance: Tensor, out_weight: Tensor, heads: int, ridge: float) -> Ranking:
    """Return a ranking of heads: each time the one leaves whose loss the others repair best.

    covariance: of the outputs of all heads side by side, [H V, H V]; out_weight: [D, H V].
    """
    kept, left = _Left(covariance, out_weight, ridge), list(range(heads))
    removed: list[int] = []
    errors = [0.0]
    while left:
        by_head = kept.weight.unflatten(1, (len(left), -1)).permute(1, 0, 2)  # [heads left, D, V]
        own = kept.inverse.unflatten(0, (len(left), -1)).unflatten(2, (len(left), -1))
        inner = torch.linalg.cholesky(own.diagonal(dim1=0, dim2=2).permute(2, 0, 1))  # [heads left, V, V]
        alone = (torch.cholesky_solve(by_head.transpose(1, 2), inner).transpose(1, 2) * by_head).sum((1, 2))
        least = int(alone.argmin())
        inputs = torch.arange(len(kept.inverse), device=covariance.device).unflatten(0, (len(left), -1))
        others = torch.arange(len(left), device=covariance.device) != least
        errors.append(errors[-1] + kept.give_up(inputs[least], inputs[others].flatten()))
        removed.append(left.pop(least))
    return Ranking(tuple(reversed(removed)), tuple(reversed(errors)))
