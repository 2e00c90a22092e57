"""The algebra that narrows attention: queries and keys to a lower rank, values to fewer dimensions. Pure.

Both rotate first: what the kept dimensions hold is chosen among all directions, and the rotation is folded into the
projections, so nothing is added to the forward pass.

Shapes: D width, H heads, E head width, R query/key rank, V value rank.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from spvit.architecture import Attention
from spvit.kernels import NarrowWeights, Projections
from spvit.moments import cholesky, regression

JITTER = 1e-7
LONGEST = 10.0
"""Length of a kept direction of the values at most, so that one in which a head hardly varies does not become noise."""


def _augmented(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a linear map with its bias as the last column, in float64: [..., D + 1]."""
    column = weight.new_zeros(weight.shape[:-1]) if bias is None else bias
    return torch.cat([weight, column[..., None]], dim=-1).double()


def _root(moment: Tensor) -> Tensor:
    """Return the Cholesky factor of a second moment, which may be singular."""
    return cholesky(moment, JITTER)


def low_rank_logits(query_moment: Tensor, key_moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B, [E, R] each, for which q^T A B^T k is the best approximation of q^T k of rank R.

    Best in the mean square over independent queries and keys with these second moments about zero, [E, E] each:
    with C_Q = L_Q L_Q^T, C_K = L_K L_K^T and U S V^T the singular value decomposition of L_Q^T L_K,
    A = L_Q^-T U_R S_R^1/2 and B = L_K^-T V_R S_R^1/2.
    """
    query_root, key_root = _root(query_moment), _root(key_moment)
    left, values, right = torch.linalg.svd(query_root.T @ key_root)
    weight = values[:rank].sqrt()
    query = torch.linalg.solve_triangular(query_root.T, left[:, :rank] * weight, upper=True)
    key = torch.linalg.solve_triangular(key_root.T, right[:rank].T * weight, upper=True)
    return query, key


def narrow_queries_and_keys(
    layer: Projections, rank: int, second_moment: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Return query weights [H, R, D] and biases [H, R], then those of the keys, of a rank.

    Args:
        layer: the attention layer.
        rank: R, dimensions of a head's queries and keys.
        second_moment: of the layer's inputs with a one appended, about zero: [D + 1, D + 1].
    """
    queries = _augmented(layer.query_weight, layer.query_bias)  # [H, E, D + 1]
    keys = _augmented(layer.key_weight, layer.key_bias)
    narrow_queries, narrow_keys = [], []
    for query, key in zip(queries, keys):
        a, b = low_rank_logits(query @ second_moment @ query.T, key @ second_moment @ key.T, rank)
        narrow_queries.append(a.T @ query)
        narrow_keys.append(b.T @ key)
    query, key = (torch.stack(parts).to(layer.query_weight) for parts in (narrow_queries, narrow_keys))
    query_bias = None if layer.query_bias is None else query[..., -1]
    key_bias = None if layer.key_bias is None else key[..., -1]
    return query[..., :-1], query_bias, key[..., :-1], key_bias


def value_directions(covariance: Tensor, out_weight: Tensor, rank: int) -> Tensor:
    """Return the directions [V, E] of a head's output from which its contribution is best predicted.

    With C = L L^T and the right singular vectors V of P L: V_R^T L^-1, which makes the kept directions uncorrelated;
    they are scaled so that their variance is the mean variance of the head's output, or to length 10 if that is less.

    Args:
        covariance: C, of the head's output, [E, E].
        out_weight: P, its output projection, [D, E].
        rank: V.
    """
    root = _root(covariance)
    right = torch.linalg.svd(out_weight.double() @ root, full_matrices=False).Vh[:rank]  # [V, E]
    if len(right) < rank:  # fewer outputs than kept dimensions: any further directions complete the basis
        right = torch.linalg.qr(torch.cat([right.T, torch.eye(len(root), dtype=root.dtype, device=root.device)], 1)).Q
        right = right.T[:rank]
    level = covariance.diagonal().mean().clamp(min=1e-12).sqrt()
    directions = level * torch.linalg.solve_triangular(root, right, upper=False, left=False)
    return directions * (LONGEST / directions.norm(dim=1, keepdim=True)).clamp(max=1)


def natural_out_weight(covariance: Tensor, out_weight: Tensor, directions: Tensor) -> Tensor:
    """Return the output projection [D, V] that best predicts a head's contribution from the kept directions alone.

    covariance: [E, E]; out_weight: [D, E]; directions: [V, E].
    """
    kept = directions @ covariance
    return regression(kept @ directions.T, kept @ out_weight.double().T, JITTER).T


def narrow_heads(layer: Projections, attention: Attention, second_moment: Tensor) -> NarrowWeights:
    """Return the kept heads of a layer with their queries and keys at the kept rank; values and outputs stay whole.

    second_moment: as in `narrow_queries_and_keys`.
    """
    shared = layer.shared
    kept = list(range(len(layer.query_weight)) if attention.heads is None else attention.heads)
    if attention.query_key_rank is None:
        queries_and_keys = (layer.query_weight, layer.query_bias, layer.key_weight, layer.key_bias)
    else:
        queries_and_keys = narrow_queries_and_keys(layer, attention.query_key_rank, second_moment)
    query_weight, query_bias, key_weight, key_bias = (
        None if part is None else part.detach()[kept] for part in queries_and_keys
    )
    assert query_weight is not None
    assert key_weight is not None
    return NarrowWeights(
        query_weight,
        query_bias,
        key_weight,
        key_bias,
        shared.value_weight.detach()[kept],
        None if shared.value_bias is None else shared.value_bias.detach()[kept],
        shared.out_weight.detach()[:, kept],
        None if shared.out_bias is None else shared.out_bias.detach(),
    )


def narrow_values(weights: NarrowWeights, rank: int, covariances: Tensor) -> tuple[NarrowWeights, Tensor]:
    """Return weights whose values have a rank, and the map [H, V, E] from the former outputs of the heads to theirs.

    The output projection is the one that fits them best head by head. covariances: of the former outputs, [H, E, E].
    """
    dtype = weights.value_weight
    directions, out_weights = [], []
    for head, covariance in enumerate(covariances.double()):
        out_weight = weights.out_weight[:, head]
        directions.append(value_directions(covariance, out_weight, rank))
        root = _root(covariance)  # makes a definite one of it, whatever rounding has done
        out_weights.append(natural_out_weight(root @ root.T, out_weight, directions[-1]))
    rotation = torch.stack(directions)  # [H, V, E]
    bias = weights.value_bias
    narrow = replace(
        weights,
        value_weight=(rotation @ weights.value_weight.double()).to(dtype),
        value_bias=None if bias is None else torch.einsum("hve,he->hv", rotation, bias.double()).to(dtype),
        out_weight=torch.stack(out_weights, dim=1).to(dtype),
    )
    return narrow, rotation


def narrow_blindly(layer: Projections, attention: Attention) -> NarrowWeights:
    """Return the weights of a narrowed layer chosen from its weights alone, as if its inputs were white noise."""
    dim = layer.query_weight.shape[-1]
    white = torch.eye(dim + 1, dtype=torch.float64, device=layer.query_weight.device)
    weights = narrow_heads(layer, attention, white)
    if attention.value_rank is None:
        return weights
    values = weights.value_weight.double()
    return narrow_values(weights, attention.value_rank, values @ values.transpose(1, 2))[0]
