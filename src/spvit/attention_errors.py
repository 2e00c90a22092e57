"""What narrower attention cannot give, for every choice of its heads and ranks: a pass of the images a query/key rank.

The rest follows from moments. With S the covariance of the outputs of all heads, rotated so that fewer of their
dimensions are the first ones, and B the ridge solution from them to the dense layer's output, what is left is
tr(cov(y)) - 2 tr(B S_xy) + tr(B S B^T); heads then leave by backward elimination.

Shapes: H heads, E head width, V value rank, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spvit.architecture import Attention
from spvit.blockwise import Layer
from spvit.moments import Moments, regression, ridge_for
from spvit.narrowing import value_directions
from spvit.ranking import Ranking, rank_heads
from spvit.repair import inputs_of_attention, own_covariances, rotated_queries

MOST_RANKS = 7
"""Ranks below the head width of which all pairs are considered: in finer steps neighbours hardly differ."""


@dataclass(frozen=True)
class Missed:
    """Mean squared error over tokens, summed over outputs, of a narrower layer that is repaired."""

    logits: float
    """What the same layer misses with all of its heads and values: the part of queries and keys of a lower rank."""
    outputs: float
    """What it misses beyond that: the part of fewer values and heads."""


def paired_ranks(ranks: Sequence[int]) -> list[int]:
    """Return at most seven of some ascending ranks, evenly spread, the last among them."""
    if len(ranks) <= MOST_RANKS:
        return list(ranks)
    return [ranks[-1 - index * len(ranks) // MOST_RANKS] for index in reversed(range(MOST_RANKS))]


def attention_errors(layer: Layer, ranks: Sequence[int]) -> dict[Attention, Missed]:
    """Return how much of a dense attention layer's output each narrower layer misses after its repair.

    Norms over the dimensions of a head or over all outputs forbid some: then queries and keys keep all dimensions, or
    values and heads do.

    Args:
        layer: a dense block, and the inputs that repairs are fitted to.
        ranks: that queries and keys, and values, may have beside all dimensions, ascending.

    Returns:
        The error of each choice but the whole layer; empty when the family's attention cannot be narrowed.
    """
    path = layer.sites.attention.path
    projections = layer.family.access.read_projections(layer.host.get_submodule(path))
    if projections is None:
        return {}
    heads, width = layer.sites.attention.heads, layer.sites.attention.head_width
    query_key_ranks = ranks if projections.query_norm is None else ()
    value_ranks, fewest = (ranks, 1) if projections.out_norm is None else ((), heads)
    biased = projections.shared.out_bias is not None
    wanted, second_moment = Moments(), inputs_of_attention(layer)
    for out in layer.wanted(path):
        wanted.add(out)
    total = float(wanted.products(biased)[0].trace())
    errors: dict[Attention, Missed] = {}
    for query_key_rank in (*query_key_ranks, None):
        weights, moments = rotated_queries(layer, projections, Attention(query_key_rank=query_key_rank), second_moment)
        directions = [
            value_directions(own, weights.out_weight[:, head], width)
            for head, own in enumerate(own_covariances(moments, heads))
        ]
        rotation = torch.block_diag(*directions)
        covariance, cross = moments.products(biased)
        covariance, cross = rotation @ covariance @ rotation.T, rotation @ cross
        fits = {}
        for value_rank in (None, *value_ranks):
            first = torch.arange(len(rotation), device=rotation.device).view(heads, width)[:, :value_rank].flatten()
            ridge = ridge_for(moments, len(first), layer.ridge)
            fits[value_rank] = _fit(covariance[first][:, first], cross[first], total, heads, ridge)
        logits = fits[None][0] if query_key_rank is not None else 0.0
        for value_rank, (left, ranking) in fits.items():
            outputs = max(left - logits, 0.0) if value_rank is not None else 0.0
            for count in range(fewest, heads + 1):
                kept = tuple(sorted(ranking.units[:count])) if count < heads else None
                missed = Missed(logits, outputs + ranking.errors[count])
                errors[Attention("msa", kept, query_key_rank, value_rank)] = missed
    del errors[Attention()]
    return errors


def _fit(covariance: Tensor, cross: Tensor, total: float, heads: int, ridge: float) -> tuple[float, Ranking]:
    """Return the error of the ridge solution from all heads' outputs, and what it grows by as heads leave.

    Args:
        covariance: of the heads' outputs side by side, [H V, H V].
        cross: with the dense layer's output, [H V, D].
        total: variance of the dense layer's output, summed over its dimensions.
        heads: H.
        ridge: relative to the mean variance of the heads' outputs.
    """
    out = regression(covariance, cross, ridge)  # [H V, D]
    left = total - 2 * float((out * cross).sum()) + float((out * (covariance @ out)).sum())
    return max(left, 0.0), rank_heads(covariance, out.T, heads, ridge)
