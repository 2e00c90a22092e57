"""The weights of narrower attention, from those of the whole layer and from how queries, keys and values vary.

Shapes: D width, H heads, E head width, R query/key dimensions and V value dimensions of a head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spvit.architecture import Attention
from spvit.hosts.weights import AttentionWeights
from spvit.moments import cholesky, regression

JITTER = 1e-7
LONGEST = 10.0
"""Length of a kept direction of the values at most, so that what hardly varies does not become noise."""


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
    A = L_Q^-T U_R S_R^1/2 and B = L_K^-T V_R S_R^1/2. For example with E = 2, C_K = I and C_Q = diag(4, 1):
    L_Q^T L_K = diag(2, 1), and rank 1 keeps the first dimension: A = (1/2, 0)^T sqrt(2), B = (1, 0)^T sqrt(2).
    """
    query_root, key_root = _root(query_moment), _root(key_moment)
    left, values, right = torch.linalg.svd(query_root.T @ key_root)
    weight = values[:rank].sqrt()
    query = torch.linalg.solve_triangular(query_root.T, left[:, :rank] * weight, upper=True)
    key = torch.linalg.solve_triangular(key_root.T, right[:rank].T * weight, upper=True)
    return query, key


def narrow_heads(weights: AttentionWeights, kept: Attention, second_moment: Tensor) -> AttentionWeights:
    """Return the kept heads of a layer with their queries and keys at the kept rank; values and outputs stay whole.

    second_moment: of the layer's inputs with a one appended, about zero: [D + 1, D + 1].
    """
    whole = _some_heads(weights, kept)
    if kept.query_key_rank is None:
        return whole
    queries = _augmented(whole.query_weight, whole.query_bias)  # [H, E, D + 1]
    keys = _augmented(whole.key_weight, whole.key_bias)
    narrow_queries, narrow_keys = [], []
    for query, key in zip(queries, keys):
        moments = (query @ second_moment @ query.T, key @ second_moment @ key.T)
        a, b = low_rank_logits(*moments, kept.query_key_rank)
        narrow_queries.append(a.T @ query)
        narrow_keys.append(b.T @ key)
    query, key = (torch.stack(parts).to(whole.query_weight) for parts in (narrow_queries, narrow_keys))
    return replace(
        whole,
        query_weight=query[..., :-1],
        query_bias=None if whole.query_bias is None else query[..., -1],
        key_weight=key[..., :-1],
        key_bias=None if whole.key_bias is None else key[..., -1],
    )


def _some_heads(weights: AttentionWeights, kept: Attention) -> AttentionWeights:
    """Return the weights of the kept heads, without gradients."""
    heads = list(range(len(weights.query_weight)) if kept.heads is None else kept.heads)
    by_head: dict[str, Any] = {
        name: None if part is None else part.detach()[heads]
        for name, part in vars(weights).items()
        if not name.startswith("out_")
    }
    out_bias = None if weights.out_bias is None else weights.out_bias.detach()
    return AttentionWeights(**by_head, out_weight=weights.out_weight.detach()[:, heads], out_bias=out_bias)


def value_directions(weights: AttentionWeights, covariances: Tensor) -> Tensor:
    """Return the directions [H, E, E] of each head's outputs, those first that predict its contribution best.

    With C = L L^T the covariance of a head's outputs, P its output projection and V the right singular vectors of P L:
    V^T L^-1, which makes the directions uncorrelated; they are scaled so that their variance is the mean variance of
    the head's outputs, or to length 10 if that is less. covariances: [H, E, E].
    """
    found = []
    for head, covariance in enumerate(covariances.double()):
        root, width = _root(covariance), len(covariance)
        right = torch.linalg.svd(weights.out_weight[:, head].double() @ root, full_matrices=False).Vh  # [.., E]
        if len(right) < width:  # fewer outputs than dimensions: any further directions complete the basis
            eye = torch.eye(width, dtype=root.dtype, device=root.device)
            right = torch.linalg.qr(torch.cat([right.T, eye], 1)).Q.T
        level = covariance.diagonal().mean().clamp(min=1e-12).sqrt()
        directions = level * torch.linalg.solve_triangular(root, right, upper=False, left=False)
        found.append(directions * (LONGEST / directions.norm(dim=1, keepdim=True)).clamp(max=1))
    return torch.stack(found)


def narrow_values(
    weights: AttentionWeights, directions: Tensor, kept: Attention, covariances: Tensor
) -> tuple[AttentionWeights, Tensor]:
    """Return weights whose values have the kept rank, and the map [H, V, E] from the heads' former outputs to theirs.

    The output projection is the one that best predicts each head's contribution from its kept directions alone.
    directions, covariances of the heads' outputs: [H, E, E].
    """
    like, rotation = weights.value_weight, directions[:, : kept.value_rank]
    out_weights = []
    for head, covariance in enumerate(covariances.double()):
        root = _root(covariance)  # makes a definite one of it, whatever rounding has done
        reading = rotation[head] @ root @ root.T
        projected = reading @ weights.out_weight[:, head].double().T
        out_weights.append(regression(reading @ rotation[head].T, projected, JITTER).T)
    bias = weights.value_bias
    narrow = replace(
        weights,
        value_weight=(rotation @ weights.value_weight.double()).to(like),
        value_bias=None if bias is None else torch.einsum("hve,he->hv", rotation, bias.double()).to(like),
        out_weight=torch.stack(out_weights, dim=1).to(like),
    )
    return narrow, rotation


def narrow_blindly(weights: AttentionWeights, kept: Attention) -> AttentionWeights:
    """Return the weights of a narrowed layer chosen from its weights alone, as if its inputs were white noise."""
    dim = weights.query_weight.shape[-1]
    narrow = narrow_heads(weights, kept, torch.eye(dim + 1, dtype=torch.float64, device=weights.query_weight.device))
    if kept.value_rank is None:
        return narrow
    values = narrow.value_weight.double()
    covariances = values @ values.transpose(1, 2)
    return narrow_values(narrow, value_directions(narrow, covariances), kept, covariances)[0]
