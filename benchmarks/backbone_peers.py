"""What spvit is compared with on a backbone, at equal MACs: compression of a timm ViT with nothing trained.

Every method gathers what it needs from the calibration images once, and returns a function of the share of the MACs.
It is written from its paper's formulas, on FFNs `mlp.fc1`, `mlp.act`, `mlp.fc2` and attention `attn.qkv`, `attn.proj`.

Not here: DVBP with OB2C, of which no public description was found, and torch-kirigami, which knows no budget of MACs
and ranks by magnitude or Taylor terms as Torch-Pruning does. Shapes: N tokens, D width, h heads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

import spvit
from peers import torch_pruned_to
from snapvit import snapvit
from timm_vit import BATCH, Moments, arriving, keep_units, macs_of, moments_of, tokens_of

SMALLEST_WIDTH = 8
"""Query and key widths that CORP keeps at least, as published."""
RIDGE = 1e-3

Pruning = Callable[[float], nn.Module]
"""From a share of the dense model's MACs to a pruned copy; raises BudgetError where the method does not reach it."""
Method = Callable[[nn.Module, Tensor], Pruning]


def whitened_svd(model: nn.Module, images: Tensor) -> Pruning:
    """Give every linear layer of the blocks a low rank, the best for the inputs that it gets (SVD-LLM).

    Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression" (2024,
    arXiv 2403.07378): W S is truncated, S the Cholesky factor of the inputs' second moment, and S inverted joins the
    first factor. Every layer keeps the same share of its MACs.
    """
    blocks = cast(Any, model).blocks
    names = [name for name, layer in blocks.named_modules() if isinstance(layer, nn.Linear)]
    found = moments_of(model, [blocks.get_submodule(name) for name in names], images.split(BATCH))
    factors = {name: factors_of(blocks.get_submodule(name), found[blocks.get_submodule(name)].square) for name in names}
    dense = macs_of(model, images)
    sizes = {name: blocks.get_submodule(name).weight.shape for name in names}
    tokens = tokens_of(model)
    linear = tokens * sum(rows * columns for rows, columns in sizes.values())

    def prune(share: float) -> nn.Module:
        kept = 1 - (1 - share) * dense / linear
        ranks = {name: round(kept * rows * columns / (rows + columns)) for name, (rows, columns) in sizes.items()}
        if min(ranks.values()) < 1:
            raise spvit.BudgetError(f"linear layers of low rank do not reach {share:.0%} of the MACs")
        pruned = copy.deepcopy(model)
        for name, rank in ranks.items():
            parent, _, last = name.rpartition(".")
            layer = low_rank(blocks.get_submodule(name), *factors[name], rank)
            setattr(cast(Any, pruned).blocks.get_submodule(parent), last, layer)
        return pruned

    return prune


@torch.no_grad()
def factors_of(layer: nn.Linear, square: Tensor) -> tuple[Tensor, Tensor]:
    """Return left [out, r] and right [r, in]: their first k columns and rows are the best layer of rank k.

    With W S = P diag(s) Q', the truncated W is P_k P_k' W, or W S Q_k Q_k' S^-1: the smaller eigenproblem is solved.
    """
    weight = layer.weight.double()
    rows, columns = weight.shape
    if rows <= columns:
        left = torch.linalg.eigh(weight @ square @ weight.T).eigenvectors.flip(1)
        return left, left.T @ weight
    damped = square + 1e-10 * square.diagonal().mean() * torch.eye(columns, dtype=square.dtype, device=square.device)
    root = torch.linalg.cholesky(damped)
    right = torch.linalg.eigh(root.T @ weight.T @ weight @ root).eigenvectors.flip(1)
    return weight @ root @ right, torch.linalg.solve_triangular(root, right.T, upper=False, left=False)


@torch.no_grad()
def low_rank(layer: nn.Linear, left: Tensor, right: Tensor, rank: int) -> nn.Module:
    """Return two linear layers in place of one."""
    first = nn.Linear(layer.in_features, rank, bias=False).to(layer.weight)
    second = nn.Linear(rank, layer.out_features, bias=layer.bias is not None).to(layer.weight)
    first.weight.copy_(right[:rank])
    second.weight.copy_(left[:, :rank])
    if layer.bias is not None:
        second.bias.copy_(layer.bias)
    return nn.Sequential(first, second)


def vbp(model: nn.Module, images: Tensor) -> Pruning:
    """Remove the FFN units of all blocks whose activations vary least; their means go to the bias.

    Berisha et al., "Variance-Based Pruning for Accelerating and Compressing Trained Networks" (ICCV 2025,
    arXiv 2507.12988): variances after the activation function, ranked over the whole network.
    """
    ffns = [block.mlp for block in cast(Any, model).blocks]
    found = moments_of(model, [ffn.fc2 for ffn in ffns], images.split(BATCH))
    variances = [found[ffn.fc2].covariance.diagonal() for ffn in ffns]
    ranked = torch.cat(variances).sort(descending=True).values
    dense, unit = macs_of(model, images), 2 * tokens_of(model) * ffns[0].fc1.in_features

    def prune(share: float) -> nn.Module:
        count = len(ranked) - round((1 - share) * dense / unit)
        if count < len(ffns):
            raise spvit.BudgetError(f"FFN units alone do not reach {share:.0%} of the MACs")
        pruned = copy.deepcopy(model)
        for block, ffn, variance in zip(cast(Any, pruned).blocks, ffns, variances):
            kept = (variance >= min(ranked[count - 1], variance.max())).nonzero().flatten()
            constant = found[ffn.fc2].mean.clone()
            constant[kept] = 0
            keep_units(block.mlp, kept, torch.eye(len(constant)).to(constant)[:, kept], constant)
        return pruned

    return prune


class Attention(nn.Module):
    """Attention whose queries and keys are narrower than its values."""

    def __init__(self, dense: Any, query: Tensor, key: Tensor) -> None:
        """Take values and output from a dense layer, and query and key weights, the bias last, [h, width, D + 1]."""
        super().__init__()
        self.heads, self.scale = dense.num_heads, dense.scale
        rows = dense.qkv.weight.shape[0] // 3
        bias = dense.qkv.bias if dense.qkv.bias is not None else torch.zeros_like(dense.qkv.weight[:, 0])
        joined = torch.cat([dense.qkv.weight, bias[:, None]], 1)[2 * rows :]
        joined = torch.cat([query.flatten(0, 1), key.flatten(0, 1), joined])
        self.sizes = [query.shape[:2].numel(), key.shape[:2].numel(), rows]
        self.qkv = nn.Linear(dense.qkv.in_features, len(joined)).to(dense.qkv.weight)
        with torch.no_grad():
            self.qkv.weight.copy_(joined[:, :-1])
            self.qkv.bias.copy_(joined[:, -1])
        self.proj = dense.proj

    def forward(self, x: Tensor, **masks: None) -> Tensor:
        """Return the output for tokens, [B, N, D]."""
        parts = self.qkv(x).split(self.sizes, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return cast(Tensor, self.proj(mixed.transpose(1, 2).flatten(2)))


def corp(model: nn.Module, images: Tensor) -> Pruning:
    """Remove FFN units and query-key dimensions of every block; ridge regressions make up for them.

    Zhang and Yang, "CORP: Closed-Form One-shot Representation-Preserving Structured Pruning for Transformers" (2026,
    arXiv 2602.05243): the same share everywhere, block after block, each measured behind the pruned ones. Where the
    authors' program departs from what preserves the logits (it makes a matrix symmetric, and changes the softmax's
    scale by the width) this keeps to the paper.
    """
    dense = cast(Any, model)
    attention, units = dense.blocks[0].attn, dense.blocks[0].mlp.fc1.out_features
    tokens, width = tokens_of(model), dense.blocks[0].mlp.fc1.in_features
    macs, unit = macs_of(model, images), 2 * tokens * width
    dimension = attention.num_heads * (2 * tokens * width + tokens**2)

    def prune(share: float) -> nn.Module:
        cut = (1 - share) * macs / len(dense.blocks)
        kept = 1 - cut / (attention.head_dim * dimension + units * unit)
        dimensions = min(attention.head_dim, max(SMALLEST_WIDTH, round(kept * attention.head_dim)))
        kept_units = units - round((cut - (attention.head_dim - dimensions) * dimension) / unit)
        if not 1 <= kept_units <= units:
            raise spvit.BudgetError(f"FFN units and query-key dimensions do not reach {share:.0%} of the MACs")
        pruned = copy.deepcopy(model)
        batches = list(arriving(pruned, images))
        for block in cast(Any, pruned).blocks:
            found = moments_of(block, [block.mlp.fc2, block.attn.qkv], batches)
            if kept_units < units:
                _corp_ffn(block.mlp, found[block.mlp.fc2], kept_units)
            if dimensions < attention.head_dim:
                block.attn = _corp_attention(block.attn, found[block.attn.qkv], dimensions)
            with torch.no_grad():
                batches = [block(batch) for batch in batches]
        return pruned

    return prune


def _corp_ffn(ffn: Any, moments: Moments, count: int) -> None:
    """Keep the units of most energy times activity, and regress the others on them."""
    covariance, mean = moments.covariance, moments.mean
    kept = (moments.square.diagonal() * cast(Tensor, moments.active)).topk(count).indices.sort().values
    own = covariance[kept][:, kept]
    eye = torch.eye(count, dtype=own.dtype, device=own.device)
    weights = torch.linalg.solve(own + _shrinkage(own, moments.count) * eye, covariance[kept]).T.contiguous()
    weights[kept] = eye
    keep_units(ffn, kept, weights, mean - weights @ mean[kept])


def _shrinkage(covariance: Tensor, samples: int) -> float:
    """Return the ridge: oracle approximating shrinkage, at least 1e-3."""
    size = len(covariance)
    trace, squares = float(covariance.trace()), float(covariance.square().sum())
    above = (1 - 2 / size) * squares + trace**2
    below = (samples + 1 - 2 / size) * (squares - trace**2 / size)
    return max(RIDGE, min(1.0, above / below if below > 0 else 1.0) * trace / size)


def _corp_attention(attention: Any, inputs: Moments, width: int) -> Attention:
    """Keep the query-key dimensions of most energy, and transform them so that the logits stay.

    With q = (q_S, q_P) and k likewise, M minimises |q_S M k_S' - q_P k_P'|^2 + ridge |M|^2; I + M = U V' is shared out.
    """
    joined = attention.qkv.weight
    if attention.qkv.bias is not None:
        joined = torch.cat([joined, attention.qkv.bias[:, None]], 1)
    else:
        joined = nn.functional.pad(joined, (0, 1))
    query, key, _ = joined.double().unflatten(0, (3, attention.num_heads, -1))
    square = torch.cat([inputs.square, inputs.mean[None]])
    square = torch.cat([square, torch.cat([inputs.mean, inputs.mean.new_ones(1)])[:, None]], 1)
    queries, keys = (part @ square @ part.mT for part in (query, key))
    energy = queries.diagonal(dim1=1, dim2=2) * keys.diagonal(dim1=1, dim2=2)
    order = energy.argsort(1, descending=True)
    heads = torch.arange(len(order), device=order.device)[:, None, None]
    kept, gone = order[:, :width].sort(1).values, order[:, width:]
    rows, columns = kept[:, :, None], kept[:, None]
    own_query, own_key = queries[heads, rows, columns], keys[heads, rows, columns]
    wanted = queries[heads, rows, gone[:, None]] @ keys[heads, gone[:, :, None], columns]
    (values, vectors), (others, basis) = torch.linalg.eigh(own_query), torch.linalg.eigh(own_key)
    scales = values[:, :, None] * others[:, None]
    solved = (vectors.mT @ wanted @ basis) / (scales + 1e-6 * scales.mean((1, 2), keepdim=True))
    eye = torch.eye(width, dtype=solved.dtype, device=solved.device)
    left, scale, right = torch.linalg.svd(eye + vectors @ solved @ basis.mT)
    left, right = (side * scale.sqrt()[:, None] for side in (left, right.mT))
    return Attention(attention, left.mT @ query[heads[:, 0], kept], right.mT @ key[heads[:, 0], kept])


def torch_pruning(model: nn.Module, images: Tensor) -> Pruning:
    """Have Torch-Pruning choose FFN units and head dimensions by its Taylor importance, isomorphic groups apart.

    Fang et al., "DepGraph" (CVPR 2023) and "Isomorphic Pruning for Vision Models" (ECCV 2024), the package
    torch-pruning. Its loss needs labels; without any, the entropy of the softmax of the class token's features stands
    in, as in "Adaptive MLP Pruning for Large Vision Transformers" (2026, arXiv 2603.08100).
    """
    scored = copy.deepcopy(model)
    for batch in images.split(BATCH):
        torch.distributions.Categorical(logits=scored(batch)).entropy().mean().backward()
    gradients = {name: cast(Tensor, parameter.grad) for name, parameter in scored.named_parameters()}
    dense = macs_of(model, images)

    def prune(share: float) -> nn.Module:
        return torch_pruned_to(
            model, gradients, images[:1], lambda pruned: macs_of(pruned, images), round(share * dense)
        )

    return prune


METHODS: dict[str, Method] = {
    "whitened-svd": whitened_svd,
    "vbp": vbp,
    "corp": corp,
    "snapvit": snapvit,
    "torch-pruning": torch_pruning,
}
