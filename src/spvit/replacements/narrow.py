"""Attention with fewer heads or dimensions: queries and keys of a lower rank, values of fewer dimensions.

Both rotate first: what the kept dimensions hold is chosen among all directions, and the rotation is folded into the
projections, so nothing is added to the forward pass. Queries and keys keep the low-rank part of their logits that is
best in the mean square (weighted truncated singular value decomposition); values keep the directions that the output
projection uses most, whitened by how the head's outputs vary (as in whitened truncation of linear layers). Where the
places of tokens rotate queries and keys, these keep whole pairs of dimensions: those whose products are largest.

Shapes: B batch, N tokens, D width, H heads, E head width, R query/key dimensions and V value dimensions of a head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spvit.architecture import Attention, Rules
from spvit.cost import AttentionCost, count_params
from spvit.hosts.calling import called_with
from spvit.hosts.grid import Grid
from spvit.hosts.host import Host
from spvit.hosts.position import dimensions_of
from spvit.hosts.sites import AttentionSite, Rotary
from spvit.hosts.walk import BlockPair
from spvit.hosts.weights import AttentionWeights, read_weights
from spvit.moments import Moments, cholesky, regression, ridge_for
from spvit.replacements.narrow_attention import NarrowAttention, has_biases
from spvit.replacements.targets import Gathered, attention_targets

JITTER = 1e-7
"""Damping of second moments that are factorised, which may be singular."""
LONGEST = 10.0
"""Length of a kept direction of the values at most, so that what hardly varies does not become noise."""


class _Narrow:
    """The kind `msa`: the layer as it was, or narrower."""

    def make(
        self,
        layer: nn.Module,
        site: AttentionSite,
        kept: Attention,
        rules: Rules,
        grid: Grid,
        fitted: bool = False,
        tokens: str = "all",
        **hints: Any,
    ) -> nn.Module:
        """Whole, it is the layer itself; narrow, from its weights alone, as if its inputs were white noise.

        Whole for prefix tokens alone, it has the layer's weights.
        """
        if not kept.narrowed() and tokens == "all":
            return layer
        module = NarrowAttention(layer, site, kept)
        if not fitted or not kept.narrowed():
            module.load(narrow_blindly(read_weights(layer, site), kept, site.rotary))
        return module

    def fit(self, module: nn.Module, pair: BlockPair, kept: Attention) -> None:
        """Rotate queries and keys, then values, by how they vary; fit the output projection to its targets."""
        if not isinstance(module, NarrowAttention):
            return
        weights, moments = rotated_queries(pair, kept, inputs_of_attention(pair))
        rotation = torch.eye(moments.inputs, dtype=torch.float64, device=moments.mean_x.device)
        if kept.value_rank is not None:
            covariances = own_covariances(moments, len(weights.query_weight))
            weights, by_head = narrow_values(weights, value_directions(weights, covariances), kept, covariances)
            rotation = torch.block_diag(*by_head)
        biased = module.proj.bias is not None
        covariance, cross = moments.products(biased)
        prior = weights.out_weight.flatten(1).double()
        out = fitted_output(prior, rotation @ covariance @ rotation.T, rotation @ cross, moments)
        bias = moments.mean_y - out @ (rotation @ moments.mean_x) if biased else None
        module.load(replace(weights, out_weight=out.view(weights.out_weight.shape), out_bias=bias))

    def cost(self, host: Host, site: AttentionSite, metric: str) -> AttentionCost:
        """MACs: projections, and two products of [tokens, keys, H E] (paper section 3.4)."""
        layer = host.model.get_submodule(site.path)
        if metric == "macs":
            attending = site.windows * site.keys
            linear = 4 * site.heads * site.head_width * site.dim
            products = 2 * attending * site.keys * site.heads * site.head_width
            each = attending * (2 * site.dim + site.keys)
            return AttentionCost(attending * linear + products + site.extra_macs, each, each)
        norm = 0 if site.norm is None else count_params(host.model.get_submodule(site.norm))
        weights = read_weights(layer, site)
        biased, own_norms = int(has_biases(weights)), (name for name in site.norms if name is not None)
        rest = host.norm_params(site) + sum(count_params(layer.get_submodule(name)) for name in own_norms)
        rest += 0 if weights.out_bias is None else site.dim
        head = int(site.head_scales)
        if site.bias is not None and not site.bias.argument:
            table = site.bias.table
            head += site.bias.entries if table is None else layer.get_parameter(table).numel() // site.heads
        return AttentionCost(norm + count_params(layer), 2 * (site.dim + biased), 2 * site.dim + biased, rest, head)


REPLACEMENT = _Narrow()


def fitted_output(prior: Tensor, covariance: Tensor, cross: Tensor, moments: Moments) -> Tensor:
    """Return the output projection [D, X] that comes closest to the targets from narrow heads, drawn towards a prior.

    covariance: of the narrow heads' outputs side by side, [X, X]; cross: with the targets, [X, D]; both from the
    moments, which say how many tokens there were. The repair and the estimate of what is missed share this formula.
    """
    return prior + regression(covariance, cross - covariance @ prior.T, ridge_for(moments, len(covariance))).T


def inputs_of_attention(pair: BlockPair) -> Tensor:
    """Return the second moment about zero of what arrives at an attention layer with a one appended, [D + 1, D + 1]."""
    arriving = Moments()
    for x in pair.arriving(pair.sites.attention.path):
        arriving.add(torch.cat([x, torch.ones_like(x[..., :1])], dim=-1), prefix=pair.prefix)
    return arriving.products(centred=False)[0]


def rotated_queries(pair: BlockPair, kept: Attention, second_moment: Tensor) -> tuple[AttentionWeights, Moments]:
    """Return the kept heads with queries and keys at the kept rank, and the moments of their outputs and the targets.

    The heads' outputs, of whole values, are side by side [H E]. second_moment: as `inputs_of_attention` returns it.
    """
    site = pair.sites.attention
    layer = pair.host.model.get_submodule(site.path)
    weights = narrow_heads(pair.host.weights(pair.index), kept, second_moment, site.rotary)
    whole = NarrowAttention(layer, site, replace(kept, value_rank=None)).eval()
    whole.load(weights)
    gathered = Gathered(pair)
    with called_with(pair.model.get_submodule(site.path), site) as named:
        for x, target in zip(pair.arriving(site.path), attention_targets(pair)):
            gathered.add(whole.heads_out(x, **named), *target, pair.prefix)
    return weights, gathered.moments(weights.out_bias is not None)


def own_covariances(moments: Moments, heads: int) -> Tensor:
    """Return the covariance of each head's outputs, [H, E, E], from moments of all side by side, [H E]."""
    by_head = moments.covariance.unflatten(0, (heads, -1)).unflatten(2, (heads, -1))  # [H, E, H, E]
    return by_head.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _augmented(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a linear map with its bias as the last column, in float64: [..., D + 1]."""
    column = weight.new_zeros(weight.shape[:-1]) if bias is None else bias
    return torch.cat([weight, column[..., None]], dim=-1).double()


def low_rank_logits(query_moment: Tensor, key_moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B, [E, R] each, for which q^T A B^T k is the best approximation of q^T k of rank R.

    Best in the mean square over independent queries and keys with these second moments about zero, [E, E] each:
    with C_Q = L_Q L_Q^T, C_K = L_K L_K^T and U S V^T the singular value decomposition of L_Q^T L_K,
    A = L_Q^-T U_R S_R^1/2 and B = L_K^-T V_R S_R^1/2. For example with E = 2, C_K = I and C_Q = diag(4, 1):
    L_Q^T L_K = diag(2, 1), and rank 1 keeps the first dimension: A = (1/2, 0)^T sqrt(2), B = (1, 0)^T sqrt(2).
    """
    query_root, key_root = cholesky(query_moment, JITTER), cholesky(key_moment, JITTER)
    left, values, right = torch.linalg.svd(query_root.T @ key_root)
    weight = values[:rank].sqrt()
    query = torch.linalg.solve_triangular(query_root.T, left[:, :rank] * weight, upper=True)
    key = torch.linalg.solve_triangular(key_root.T, right[:rank].T * weight, upper=True)
    return query, key


def narrow_heads(
    weights: AttentionWeights, kept: Attention, second_moment: Tensor, rotary: Rotary | None = None
) -> AttentionWeights:
    """Return the kept heads of a layer with their queries and keys at the kept rank; values and outputs stay whole.

    second_moment: of the layer's inputs with a one appended, about zero: [D + 1, D + 1].
    """
    whole = _some_heads(weights, kept)
    if kept.query_key_rank is None:
        return whole
    queries = _augmented(whole.query_weight, whole.query_bias)  # [H, E, D + 1]
    keys = _augmented(whole.key_weight, whole.key_bias)
    if rotary is not None:
        products = _energies(queries, second_moment, rotary) * _energies(keys, second_moment, rotary)
        return _with_pairs(whole, products.topk(kept.query_key_rank // 2).indices.sort().values, rotary)
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


def _energies(projection: Tensor, second_moment: Tensor, rotary: Rotary) -> Tensor:
    """Return the mean squared length of queries or keys in each pair of rotating dimensions, [H, E / 2].

    At any angle the product of independent queries and keys has in a pair the mean square E|q|^2 E|k|^2 / 2.
    """
    by_dimension = torch.einsum("hed,dc,hec->he", projection, second_moment, projection)
    return by_dimension.unflatten(1, (-1, 2)).sum(2) if rotary.pairs else by_dimension.unflatten(1, (2, -1)).sum(1)


def _with_pairs(weights: AttentionWeights, pairs: Tensor, rotary: Rotary) -> AttentionWeights:
    """Return weights whose queries and keys keep some pairs of rotating dimensions, [H, R / 2]."""
    rows = dimensions_of(pairs, rotary.pairs, weights.query_weight.shape[1])
    heads = torch.arange(len(rows), device=rows.device)[:, None]
    return replace(
        weights,
        query_weight=weights.query_weight[heads, rows],
        query_bias=None if weights.query_bias is None else weights.query_bias[heads, rows],
        key_weight=weights.key_weight[heads, rows],
        key_bias=None if weights.key_bias is None else weights.key_bias[heads, rows],
        pairs=pairs,
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
        root, width = cholesky(covariance, JITTER), len(covariance)
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
        root = cholesky(covariance, JITTER)  # makes a definite one of it, whatever rounding has done
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


def narrow_blindly(weights: AttentionWeights, kept: Attention, rotary: Rotary | None = None) -> AttentionWeights:
    """Return the weights of a narrowed layer chosen from its weights alone, as if its inputs were white noise."""
    dim = weights.query_weight.shape[-1]
    white = torch.eye(dim + 1, dtype=torch.float64, device=weights.query_weight.device)
    narrow = narrow_heads(weights, kept, white, rotary)
    if kept.value_rank is None:
        return narrow
    values = narrow.value_weight.double()
    covariances = values @ values.transpose(1, 2)
    return narrow_values(narrow, value_directions(narrow, covariances), kept, covariances)[0]
