"""Closed-form recovery at pruning: what was removed is predicted from what stays, from unlabelled images.

Every layer that pruning changed is solved as a least-squares problem: its inputs are those of the network pruned so
far, its target is the dense layer's output. Images pass block by block; second moments are summed up as they do.
Sources: CORP (arXiv 2602.05243) for FFN units, Variance-Based Pruning (arXiv 2507.12988) for the shift of the mean.

Shapes: B batch, N tokens = P prefix tokens + G grid tokens, D width, E head width, K kept units.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spvit.architecture import Architecture, Attention, Block
from spvit.blockwise import Layer, advance, block_inputs, calibration_batches, evaluating
from spvit.errors import CalibrationError
from spvit.hosts.base import Family
from spvit.kernels import NarrowWeights, Projections
from spvit.moments import NOT_FINITE, RIDGE, Moments, low_rank_regression, regression, ridge_for
from spvit.narrowing import narrow_heads, narrow_values
from spvit.pruned import BottleneckConv, Constant, NarrowAttention, Skip, as_map

PREFIX_RULE = "linear"
SKIP_RULE = "mean"
LINEAR_SIDE = 4.0
"""Standard deviations by which a repaired convolution's activations are moved to where ReLU is linear."""


def repair(
    model: nn.Module,
    host: nn.Module,
    family: Family,
    architecture: Architecture,
    images: Tensor | Iterable[Any],
    ridge: float = RIDGE,
) -> None:
    """Set the weights of a pruned model in place so that it does on these images what the host does.

    What pruning left whole keeps its weights, bit for bit.

    Args:
        model: the host pruned to the architecture, on the host's device.
        host: the dense model.
        family: the host's.
        architecture: what the model keeps.
        images: as in `calibration_batches`.
        ridge: penalty relative to the mean variance of a layer's inputs; a huge one leaves the shift of the mean alone.

    Raises:
        CalibrationError: the images do not fit the host, are too few, or lead to activations that are not finite.
    """
    blocks = family.blocks(host)
    with evaluating(model, host):
        batches = calibration_batches(images, family, host)
        dense_inputs = block_inputs(host, blocks[0], batches)
        inputs = list(dense_inputs)
        for index, (sites, kept) in enumerate(zip(blocks, architecture.blocks)):
            repair_block(Layer(model, host, family, sites, inputs, dense_inputs, ridge), kept)
            following = blocks[index + 1] if index + 1 < len(blocks) else None
            if following is None:
                return
            untouched = all(a is b for a, b in zip(inputs, dense_inputs)) and not changed(kept)
            for number, x in enumerate(dense_inputs):
                dense_inputs[number] = advance(host, sites, following, x)
                # Until something is pruned both networks are one.
                inputs[number] = dense_inputs[number] if untouched else advance(model, sites, following, inputs[number])


def changed(kept: Block) -> bool:
    """Return whether pruning changes a block."""
    return kept.attention.kind != "msa" or kept.attention.narrowed() or len(kept.ffn.units) < kept.ffn.width


def repair_block(layer: Layer, kept: Block) -> None:
    """Repair one block in place: its attention, then its FFN behind the repaired attention."""
    replacement = layer.model.get_submodule(layer.sites.attention.path)
    if isinstance(replacement, NarrowAttention):
        _repair_narrow(layer, replacement, kept.attention)
    elif isinstance(replacement, BottleneckConv):
        _repair_convolution(layer, replacement)
    elif isinstance(replacement, Skip) and replacement.mean is not None:
        _repair_constant(layer, replacement.mean)
    if len(kept.ffn.units) < kept.ffn.width:
        _repair_linear(layer, layer.sites.ffn.second)


def correction(moments: Moments, biased: bool, ridge: float = RIDGE) -> tuple[Tensor, Tensor | None]:
    """Return what to add to a linear layer, weight [Y, X] and bias [Y], given moments of its inputs x and errors y.

    Without a bias to correct, the moments about zero count, as nothing else can take up a mean.
    """
    weight = regression(*moments.products(biased), ridge_for(moments, ridge=ridge)).T
    return weight, moments.mean_y - weight @ moments.mean_x if biased else None


def _repair_linear(layer: Layer, path: str) -> None:
    """Correct a linear layer of the pruned block so that it gives what the dense one does.

    W <- W + S_yx (S_xx + lI)^-1, y being what the dense layer gives less what this one does. For an FFN with the inputs
    of the dense one, y = W2[:, P] h_P is the part of the removed units P, and the correction W2[:, P] S_PK
    (S_KK + lI)^-1.
    """
    linear = layer.model.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    moments = Moments()
    for x, wanted in zip(layer.arriving(path), layer.wanted(path)):
        moments.add(x, wanted - linear(x))
    correct(linear, moments, layer.ridge)


def correct(linear: nn.Linear, moments: Moments, ridge: float = RIDGE) -> None:
    """Correct a linear layer in place, given moments of its inputs x and errors y."""
    weight, bias = correction(moments, linear.bias is not None, ridge)
    linear.weight.add_(weight.to(linear.weight))
    if bias is not None:
        linear.bias.add_(bias.to(linear.bias))


def inputs_of_attention(layer: Layer) -> Tensor:
    """Return the second moment about zero of what arrives at an attention layer with a one appended, [D + 1, D + 1]."""
    arriving = Moments()
    for x in layer.arriving(layer.sites.attention.path):
        arriving.add(torch.cat([x, torch.ones_like(x[..., :1])], dim=-1))
    return arriving.second_x


def rotated_queries(
    layer: Layer, projections: Projections, kept: Attention, second_moment: Tensor
) -> tuple[NarrowWeights, Moments]:
    """Return the kept heads with queries and keys at the kept rank, and the moments of what they and the host give.

    Args:
        layer: the block.
        projections: of the host's attention layer.
        kept: heads and query/key rank; values stay whole.
        second_moment: as `inputs_of_attention` returns it.

    Returns:
        The weights, and moments of the heads' outputs side by side [H E] and of the dense layer's output [D].
    """
    path = layer.sites.attention.path
    weights = narrow_heads(projections, kept, second_moment)
    whole = NarrowAttention(weights, projections, returns_tuple=False).eval()
    moments = Moments()
    for x, wanted in zip(layer.arriving(path), layer.wanted(path)):
        moments.add(whole.heads_out(x), wanted)
    return weights, moments


def _repair_narrow(layer: Layer, replacement: NarrowAttention, kept: Attention) -> None:
    """Rotate queries and keys, then values, by how they vary; fit the output projection to the dense layer's output."""
    projections = layer.family.access.read_projections(layer.host.get_submodule(layer.sites.attention.path))
    assert projections is not None
    weights, moments = rotated_queries(layer, projections, kept, inputs_of_attention(layer))
    biased = replacement.proj.bias is not None
    if kept.value_rank is None:
        narrow, rotation = weights, torch.eye(moments.inputs, dtype=torch.float64, device=moments.mean_x.device)
    else:
        narrow, by_head = narrow_values(weights, kept.value_rank, own_covariances(moments, len(weights.query_weight)))
        rotation = torch.block_diag(*by_head)
    replacement.load(_fitted(narrow, rotation, moments, biased, layer.ridge))


def own_covariances(moments: Moments, heads: int) -> Tensor:
    """Return the covariance of each head's outputs, [H, E, E], from moments of all side by side, [H E]."""
    by_head = moments.covariance.unflatten(0, (heads, -1)).unflatten(2, (heads, -1))  # [H, E, H, E]
    return by_head.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _fitted(narrow: NarrowWeights, rotation: Tensor, moments: Moments, biased: bool, ridge: float) -> NarrowWeights:
    """Return narrow weights whose output projection is the ridge solution from their heads' outputs.

    Args:
        narrow: the weights; the ridge draws towards their own output projection.
        rotation: from the outputs of the whole heads to those of the narrow ones, [H V, H E].
        moments: of the outputs of the whole heads, [H E], and of the dense layer's output, [D].
        biased: whether the layer has an output bias.
        ridge: relative to the mean variance of the narrow heads' outputs.
    """
    prior = narrow.out_weight.flatten(1).double()  # [D, H V]
    covariance, cross = moments.products(biased)
    inner = rotation @ covariance @ rotation.T
    error = rotation @ cross - inner @ prior.T
    out = prior + regression(inner, error, ridge_for(moments, len(rotation), ridge)).T
    bias = (moments.mean_y - out @ rotation @ moments.mean_x).to(prior) if biased else None
    return replace(narrow, out_weight=out.view(narrow.out_weight.shape), out_bias=bias)


def _repair_convolution(layer: Layer, replacement: BottleneckConv) -> None:
    """Fit both linear maps of a bottleneck as one of its rank; ReLU stays linear at first, for training to bend."""
    site = layer.sites.attention
    prefix = site.prefix_tokens
    three = isinstance(replacement.conv_in, nn.Conv2d)
    on_grid, on_prefix = Moments(), Moments()
    constants = _Means()
    for x, wanted in zip(layer.arriving(site.path), layer.wanted(site.path)):
        tokens = x[:, prefix:]
        if three:
            size = replacement.grid.size(x, prefix)
            tokens = F.unfold(as_map(tokens, size), 3, padding=1).transpose(1, 2)  # [B, G, 9 D]
        wanted_grid = site.own_grid().gather(wanted, prefix)
        on_grid.add(tokens, wanted_grid)
        constants.add(wanted[:, :prefix], wanted_grid)
        if prefix:
            on_prefix.add(x[:, :prefix], wanted[:, :prefix])
    rank = len(replacement.conv_in.weight)
    inward, outward = low_rank_regression(
        on_grid.covariance, on_grid.cross, ridge_for(on_grid, ridge=layer.ridge), rank
    )
    mean = inward.T @ on_grid.mean_x
    variance = ((on_grid.covariance @ inward) * inward).sum(0)
    replacement.set_linear(inward.T, mean, variance, outward.T, on_grid.mean_y, LINEAR_SIDE)
    if isinstance(replacement.prefix, Constant):
        replacement.prefix.bias.copy_(constants.by_token()[:prefix])
    elif isinstance(replacement.prefix, nn.Sequential):
        first, second = cast(nn.Linear, replacement.prefix[0]), cast(nn.Linear, replacement.prefix[1])
        inward, outward = low_rank_regression(
            on_prefix.covariance, on_prefix.cross, ridge_for(on_prefix, ridge=layer.ridge), rank
        )
        first.weight.copy_(inward.T)
        first.bias.copy_(-inward.T @ on_prefix.mean_x)
        second.weight.copy_(outward.T)
        second.bias.copy_(on_prefix.mean_y)


class _Means:
    """The mean output for each prefix token, and that for all grid tokens."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count = 0

    def add(self, prefix: Tensor, grid: Tensor) -> None:
        """prefix: [B, P, D]; grid: [B, G, D]."""
        mean = grid.double().mean(dim=1, keepdim=True)
        # Without prefix tokens windows may outnumber images in what stands for them.
        parts = [prefix.double(), mean] if prefix.shape[1] else [mean]
        self._sum = self._sum + torch.cat(parts, dim=1).sum(0)
        self._count += len(mean)

    def by_token(self) -> Tensor:
        """[P + 1, D]."""
        assert isinstance(self._sum, Tensor)
        if not self._sum.isfinite().all():
            raise CalibrationError(NOT_FINITE)
        return self._sum / self._count


def _repair_constant(layer: Layer, constant: Constant) -> None:
    """Let a skipped layer add the mean output of the dense one."""
    site, means = layer.sites.attention, _Means()
    for wanted in layer.wanted(site.path):
        means.add(wanted[:, : site.prefix_tokens], site.own_grid().gather(wanted, site.prefix_tokens))
    constant.bias.copy_(means.by_token())
