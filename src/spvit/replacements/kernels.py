"""The algebra that turns attention weights into convolution kernels: pure and differentiable.

Every formula has its one owner here (method: paper section 3.2). The search mixes *values* and pruning mixes *weights*;
both read the same head mix.

Shapes: B batch, G = height x width grid tokens (row-major), D embedding width, H heads, E head width, K = 9 positions.
Position p sits at row offset p % 3 - 1 and column offset p // 3 - 1 (column-major).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from spvit.hosts.weights import AttentionWeights

POSITIONS = 9
CENTRE = 4


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
    """Return S [H, K], the weight of each head at each kernel position, from M [H, K]; every column sums to one.

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


def convolve_values(values: Tensor, mix: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the 3 x 3 and the 1 x 1 convolution of x by its values, without biases: two of [B, G, E].

    Equal to convolving x with the kernels K_p, at H x K x E multiplications a token in place of K x E x D, since the
    value projection is shared by all positions: mix the heads for every position, then add nine shifted maps.

    values: [B, G, H, E], without biases, since a convolution pads x and not its values; mix: S, [H, K]; grid: (height,
    width).
    """
    # In parts so small that nine maps of one are about as large as all values.
    parts = values.split(max(1, len(values) * values.shape[2] // POSITIONS))
    convolved = [_convolve_part(part, mix.to(values.dtype), grid) for part in parts]
    summed, centre = (torch.cat(own) for own in zip(*convolved))
    return summed, centre


def _convolve_part(values: Tensor, mix: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    maps = torch.tensordot(mix, values, dims=([0], [2])).unflatten(2, grid).unbind()  # K of [B, height, width, E]
    summed = torch.zeros_like(maps[CENTRE])
    for position, plane in enumerate(maps):
        row, column = offsets(position)
        summed += F.pad(plane, (0, 0, -column, column, -row, row))
    return summed.flatten(1, 2), maps[CENTRE].flatten(1, 2)


def _out_bias(weights: AttentionWeights) -> Tensor:
    if weights.out_bias is None:
        return weights.out_weight.new_zeros(weights.out_weight.shape[0])
    return weights.out_bias
