"""SnapViT, a peer of spvit in benchmarks/backbone.py: gradients, an evolution strategy, corrected weights.

Simoncini et al., "Elastic ViTs from Pretrained Models without Retraining" (NeurIPS 2025, arXiv 2510.17700), with the
settings that its authors publish for DINO ViT-B/16 with weight correction. FFN units and whole heads go, ranked over
the network by their squared gradients of the DINO loss, times a weight for every FFN and head. The weights are found by
xNES (Glasmachers et al., GECCO 2010): 50 draws, each judged by the cosine of principal components of the features at
four sizes. What is left of each second layer is corrected for what went.

Departures: fitness is measured on 256 images, not 1,000; the correction is the exact minimum, which SparseGPT
approaches column by column; every view of a batch draws its own box; the strategy's start is judged too.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

import spvit
from timm_vit import BATCH, Moments, arriving, keep_units, macs_of, moments_of, tokens_of

GLOBAL_VIEWS, LOCAL_VIEWS = (2, (0.25, 1.0)), (10, (0.05, 0.25))
"""How many views, and the shares of the area that they show."""
DRAWS, FITNESS_IMAGES, COMPONENTS = 50, 256, 192
SIZES = (0.15, 0.35, 0.55, 0.65)
"""Shares of FFN units that go when fitness is measured."""
BEFORE_HEADS = 0.15
"""The share of heads that go is that of units less this."""
FIRST, LAST = 1.2, 0.8
"""Weights of the first and of the last block that the strategy starts from."""
KEPT_UNITS, KEPT_HEADS = 0.05, 0.2
"""Shares that every block keeps."""
DAMPING = 0.01


def snapvit(model: nn.Module, images: Tensor) -> Callable[[float], nn.Module]:
    """Score once and find the weights once; prune to any share."""
    dense = cast(Any, model)
    blocks, attention, ffn = len(dense.blocks), dense.blocks[0].attn, dense.blocks[0].mlp
    scores = squared_gradients(model, images)
    generator = torch.Generator().manual_seed(0)
    start = torch.linspace(FIRST, LAST, blocks).double()
    start = torch.cat([start, start.repeat_interleave(attention.num_heads)])
    fitness_images = images[:FITNESS_IMAGES]
    with torch.no_grad():
        wanted = _pooled(model, fitness_images)
    centre = wanted.mean(0)
    axes = torch.pca_lowrank(wanted - centre, min(COMPONENTS, *wanted.shape), center=False)[2]

    def loss(weights: Tensor) -> float:
        total = 0.0
        for size in SIZES:
            kept = ranked(scores, weights, size, max(0.0, size - BEFORE_HEADS))
            found = _pooled(_cut(model, *kept), fitness_images)
            total -= float(torch.cosine_similarity((found - centre) @ axes, (wanted - centre) @ axes).mean())
        return total

    weights = xnes(loss, start, DRAWS, generator)
    tokens, width = tokens_of(model), ffn.fc1.in_features
    macs, unit = macs_of(model, images), 2 * tokens * width
    head = attention.head_dim * (4 * tokens * width + 2 * tokens**2)

    def prune(share: float) -> nn.Module:
        cut = (1 - share) * macs
        units, heads = blocks * ffn.fc1.out_features, blocks * attention.num_heads
        gone = cut / (units * unit)
        if gone > BEFORE_HEADS:
            gone = (cut + BEFORE_HEADS * heads * head) / (units * unit + heads * head)
        gone_heads = round(max(0.0, gone - BEFORE_HEADS) * heads)
        gone_units = (cut - gone_heads * head) / (units * unit)
        if gone_units > 1 - KEPT_UNITS or gone_heads > heads - blocks * _least_heads(attention.num_heads):
            raise spvit.BudgetError(f"FFN units and heads do not reach {share:.0%} of the MACs")
        return corrected(model, *ranked(scores, weights, gone_units, gone_heads / heads), images)

    return prune


def squared_gradients(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean squared gradients of the DINO loss: of units' first weights [L, U], and heads' values [L, h]."""
    student, views = copy.deepcopy(model), random.Random(0)
    for batch in images.split(16):
        crops = [_view(batch, scale, views) for count, scale in (GLOBAL_VIEWS, LOCAL_VIEWS) for _ in range(count)]
        found = nn.functional.normalize(cast(Tensor, student(torch.cat(crops))), dim=-1).chunk(len(crops))
        teachers = [view.detach().softmax(-1) for view in found[: GLOBAL_VIEWS[0]]]
        pairs = [(teacher, view) for t, teacher in enumerate(teachers) for s, view in enumerate(found) if t != s]
        torch.stack([-(teacher * view.log_softmax(-1)).sum(-1).mean() for teacher, view in pairs]).sum().backward()
    blocks = cast(Any, student).blocks
    units = [block.mlp.fc1.weight.grad.square().mean(1) for block in blocks]
    values = [block.attn.qkv.weight.grad.chunk(3)[2].unflatten(0, (block.attn.num_heads, -1)) for block in blocks]
    return torch.stack(units).double(), torch.stack([value.square().mean((1, 2)) for value in values]).double()


def _view(batch: Tensor, scale: tuple[float, float], generator: random.Random) -> Tensor:
    """Return one random box of a batch of square images at their size."""
    size = batch.shape[-1]
    area = generator.uniform(*scale) * size**2
    ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
    high, wide = (min(size, max(1, round(math.sqrt(area * factor)))) for factor in (1 / ratio, ratio))
    top, left = generator.randint(0, size - high), generator.randint(0, size - wide)
    box = batch[..., top : top + high, left : left + wide]
    return nn.functional.interpolate(box, (size, size), mode="bilinear", antialias=True)


def xnes(loss: Callable[[Tensor], float], start: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Return the best, without signs, of the start and `draws` draws of an exponential natural evolution strategy."""
    size = len(start)
    population = 4 + int(3 * math.log(size))
    ranks = torch.arange(1, population + 1, dtype=start.dtype)
    utilities = (math.log(population / 2 + 1) - ranks.log()).clamp(min=0)
    utilities = utilities / utilities.sum() - 1 / population
    rate = (9 + 3 * math.log(size)) / (5 * size * math.sqrt(size))
    centre, root = start.clone(), torch.eye(size, dtype=start.dtype)
    best = (loss(start), start)
    while draws > 0:
        noise = torch.randn(min(population, draws), size, dtype=start.dtype, generator=generator)
        points = (centre + noise @ root.T).abs()
        losses = [loss(point) for point in points]
        best = min(best, *zip(losses, points), key=lambda pair: pair[0])
        draws -= len(noise)
        if len(noise) == population:
            drawn = noise[torch.tensor(losses).argsort()]
            centre = centre + root @ (utilities @ drawn)
            change = drawn.T @ (utilities[:, None] * drawn) - utilities.sum() * torch.eye(size, dtype=start.dtype)
            root = root @ torch.matrix_exp(rate / 2 * change)
    return best[1]


def ranked(
    scores: tuple[Tensor, Tensor], weights: Tensor, gone_units: float, gone_heads: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Return what every block keeps when shares of all units and heads go: indices, a tensor a block."""
    kept = []
    blocks, heads = scores[1].shape
    shares = (weights[:blocks, None], weights[blocks:].reshape(blocks, heads))
    least = (int(KEPT_UNITS * scores[0].shape[1]), _least_heads(heads))
    for score, weight, gone, few in zip(scores, shares, (gone_units, gone_heads), least):
        weighed = score * weight.to(score)
        weighed = weighed.scatter(1, weighed.topk(few, 1).indices, math.inf)
        bound = weighed.flatten().argsort()[: round(gone * weighed.numel())]
        mask = torch.ones_like(weighed, dtype=torch.bool).flatten()
        mask[bound] = False
        kept.append([row.nonzero().flatten() for row in mask.reshape(weighed.shape)])
    return kept[0], kept[1]


def _least_heads(heads: int) -> int:
    """Return how many heads every block keeps."""
    return max(1, int(KEPT_HEADS * heads))


def _cut(model: nn.Module, units: Sequence[Tensor], heads: Sequence[Tensor]) -> nn.Module:
    """Return a copy with some units and heads, uncorrected."""
    pruned = copy.deepcopy(model)
    for block, kept, own in zip(cast(Any, pruned).blocks, units, heads):
        _cut_block(block, kept, own, None, None)
    return pruned


def corrected(model: nn.Module, units: Sequence[Tensor], heads: Sequence[Tensor], images: Tensor) -> nn.Module:
    """Return a copy with some units and heads; block after block, the second layers make up for what went."""
    pruned = copy.deepcopy(model)
    batches = list(arriving(pruned, images))
    for block, kept, own in zip(cast(Any, pruned).blocks, units, heads):
        found = moments_of(block, [block.mlp.fc2, block.attn.proj], batches)
        _cut_block(block, kept, own, found[block.mlp.fc2], found[block.attn.proj])
        with torch.no_grad():
            batches = [block(batch) for batch in batches]
    return pruned


def _cut_block(block: Any, units: Tensor, heads: Tensor, hidden: Moments | None, mixed: Moments | None) -> None:
    """Keep some units and heads of a block; with moments of what its second layers get, correct these."""
    ffn, attention = block.mlp, block.attn
    if len(units) < ffn.fc1.out_features:
        keep_units(ffn, units, _taken_for(ffn.fc1.out_features, units, hidden))
    if len(heads) == attention.num_heads:
        return
    rows = (heads[:, None] * attention.head_dim + torch.arange(attention.head_dim, device=heads.device)).flatten()
    width = attention.proj.in_features
    with torch.no_grad():
        weights = _taken_for(width, rows, mixed).to(attention.proj.weight)
        attention.proj.weight = nn.Parameter(attention.proj.weight @ weights)
        packed = torch.cat([rows + part * width for part in range(3)])
        attention.qkv.weight = nn.Parameter(attention.qkv.weight[packed])
        if attention.qkv.bias is not None:
            attention.qkv.bias = nn.Parameter(attention.qkv.bias[packed])
    attention.num_heads, attention.attn_dim = len(heads), len(rows)
    attention.qkv.out_features, attention.proj.in_features = 3 * len(rows), len(rows)


def _taken_for(size: int, kept: Tensor, moments: Moments | None) -> Tensor:
    """Return what all inputs are taken for given those kept, [size, kept]: themselves, and regressions or nothing."""
    weights = torch.zeros(size, len(kept), dtype=torch.float64, device=kept.device)
    if moments is not None:
        square = moments.square
        damping = DAMPING * square.diagonal().mean() * torch.eye(len(kept), dtype=square.dtype, device=square.device)
        weights = torch.linalg.solve(square[kept][:, kept] + damping, square[kept]).T.contiguous()
    weights[kept] = torch.eye(len(kept), dtype=weights.dtype, device=weights.device)
    return weights


@torch.no_grad()
def _pooled(model: nn.Module, images: Tensor) -> Tensor:
    """Return what a model makes of images, [B, D]."""
    return torch.cat([model(batch) for batch in images.split(4 * BATCH)])
