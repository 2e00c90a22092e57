"""The algebra that turns attention weights into convolution kernels, and batch-norm folding: pure and differentiable.

Every formula has its one owner here (method: paper section 3.2). The search mixes *values* and pruning mixes *weights*;
both read the same head mix.

Shapes: B batch, G = height x width grid tokens (row-major), D embedding width, H heads, E head width, K = 9 positions.
Position p sits at row offset p % 3 - 1 and column offset p // 3 - 1 (column-major).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

POSITIONS = 9
CENTRE = 4


@dataclass(frozen=True)
class AttentionWeights:
    """The weights of one attention layer that the convolutions share, split by head. Views: gradients flow to the host.

    value_weight: [H, E, D]; value_bias: [H, E] or None; out_weight: [D, H, E]; out_bias: [D] or None.
    """

    value_weight: Tensor
    value_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None


@dataclass(frozen=True)
class BottleneckWeights:
    """The weights of a bottleneck convolution, as its two stock layers want them.

    in_weight: [E, D, 3, 3] or [E, D]; in_bias: [E]; out_weight: [D, E]; out_bias: [D].
    """

    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor


def offsets(position: int) -> tuple[int, int]:
    """Return the (row, column) offset of a kernel position."""
    return position % 3 - 1, position // 3 - 1


def head_mix(head_logits: Tensor, temperature: float) -> Tensor:
    """Return S [H, K], the weight of each head at each kernel position; every column sums to one.

    Args:
        head_logits: M, [H, K].
        temperature: alpha; small values pick one head, large ones average all.
    """
    return torch.softmax(head_logits / temperature, dim=0)


def mixed_out_weight(mix: Tensor, weights: AttentionWeights) -> Tensor:
    """Return the output projection of a bottleneck, sum over its positions of O_p: [D, E]. mix: [H, positions]."""
    return torch.einsum("dhe,h->de", weights.out_weight, mix.sum(dim=1))


def mixed_value_bias(mix: Tensor, weights: AttentionWeights) -> Tensor:
    """Return the mixed value biases k_p of every position: [positions, E]."""
    if weights.value_bias is None:
        return weights.value_weight.new_zeros(mix.shape[1], weights.value_weight.shape[1])
    return torch.einsum("he,hp->pe", weights.value_bias, mix)


def conv3_weights(mix: Tensor, weights: AttentionWeights) -> BottleneckWeights:
    """Return the 3 x 3 bottleneck of a head mix [H, K] as convolution weights."""
    kernels = torch.einsum("hed,hp->edp", weights.value_weight, mix)  # [E, D, K]
    in_weight = kernels.unflatten(2, (3, 3)).transpose(2, 3)  # positions are column-major, Conv2d is row-major
    return BottleneckWeights(
        in_weight, mixed_value_bias(mix, weights).sum(0), mixed_out_weight(mix, weights), _out_bias(weights)
    )


def conv1_weights(mix: Tensor, weights: AttentionWeights) -> BottleneckWeights:
    """Return the 1 x 1 bottleneck of a head mix [H, K] as linear weights: the centre position alone."""
    centre = mix[:, CENTRE : CENTRE + 1]  # [H, 1]
    in_weight = torch.einsum("hed,h->ed", weights.value_weight, centre[:, 0])
    return BottleneckWeights(
        in_weight, mixed_value_bias(centre, weights)[0], mixed_out_weight(centre, weights), _out_bias(weights)
    )


def mix_values(values: Tensor, mix: Tensor) -> Tensor:
    """Return the values of the heads mixed for every position: [K, B, G, E].

    Args:
        values: [B, G, H, E], without the value bias, so that a shifted value outside the grid is a true zero.
        mix: S, [H, K].
    """
    return torch.tensordot(mix, values, dims=([0], [2]))


def shift_and_sum(mixed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return sum over positions of the mixed values at that position's offset, zero outside the grid: [B, G, E].

    Together with `mix_values` this is the 3 x 3 convolution with kernels K_p, at H x K x E multiplications a token
    in place of K x E x D, since the value projection is shared by all positions.

    Args:
        mixed: [K, B, G, E].
        grid: (height, width) with height x width = G.
    """
    height, width = grid
    planes = mixed.unflatten(2, grid)  # [K, B, height, width, E]
    total = planes[CENTRE].clone()
    for position in range(POSITIONS):
        if position == CENTRE:
            continue
        row, column = offsets(position)
        here = total[:, max(0, -row) : height - max(0, row), max(0, -column) : width - max(0, column)]
        there = planes[position][:, max(0, row) : height + min(0, row), max(0, column) : width + min(0, column)]
        here += there
    return total.flatten(1, 2)


def fold_batchnorm(weight: Tensor, bias: Tensor, batchnorm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return weight [E, ...] and bias [E] of a linear map with the evaluation-mode batch norm after it folded in."""
    mean, variance = batchnorm.running_mean, batchnorm.running_var
    assert mean is not None
    assert variance is not None
    scale = batchnorm.weight / torch.sqrt(variance + batchnorm.eps)
    shape = (-1, *[1] * (weight.dim() - 1))
    return weight * scale.view(shape), (bias - mean) * scale + batchnorm.bias


def _out_bias(weights: AttentionWeights) -> Tensor:
    if weights.out_bias is None:
        return weights.out_weight.new_zeros(weights.out_weight.shape[0])
    return weights.out_bias


def project(hidden: Tensor, out_weight: Tensor, out_bias: Tensor | None) -> Tensor:
    """Return the bottleneck's output [..., D] from its hidden activations [..., E]."""
    return F.linear(hidden, out_weight, out_bias)
