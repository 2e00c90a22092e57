"""The algebra that turns attention weights into convolution kernels: pure and differentiable.

Every formula has its one owner here (method: paper section 3.2). The search mixes *values* and pruning mixes *weights*;
both read the same head mix.

Shapes: B batch, G = height x width grid tokens (row-major), D embedding width, H heads, E head width, K = 9 positions.
Position p sits at row offset p % 3 - 1 and column offset p // 3 - 1 (column-major).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


def convolve_values(
    values: Tensor, mix: Tensor, grid: tuple[int, int], included_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the 3 x 3 and the 1 x 1 convolution of x by its values, without biases: two of [B, G, E].

    Equal to convolving x with the kernels K_p, at H x K x E multiplications a token in place of K x E x D, since the
    value projection is shared by all positions: mix the heads for every position, then add nine shifted maps.

    Args:
        values: [B, G, H, E].
        mix: S, [H, K].
        grid: (height, width) with height x width = G.
        included_bias: the mixed value biases [K, E] when the values include theirs; they are taken out, since a
            convolution pads x and not its values: outside the grid a value is zero without its bias. No gradient
            goes to it.
    """
    summed, centre = _ConvolveValues.apply(values, mix.to(values.dtype), grid, included_bias)
    return summed, centre


class _ConvolveValues(torch.autograd.Function):
    """Goes through a batch by parts, since nine maps of all of it would be the largest tensor of a training step."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, mix: Tensor, grid: tuple[int, int], included_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(values, mix)
        ctx.grid = grid
        images, tokens, _, width = values.shape
        summed = values.new_zeros(images, *grid, width)
        centre = values.new_empty(images, tokens, width)
        for some in _parts(values):
            mixed = torch.tensordot(mix, values[some], dims=([0], [2]))  # [K, part of B, G, E]
            if included_bias is not None:
                mixed -= included_bias.to(mixed.dtype)[:, None, None]
            planes = mixed.unflatten(2, grid)
            for position in range(POSITIONS):
                here, there = _overlap(position, grid)
                summed[some][here] += planes[position][there]
            centre[some] = mixed[CENTRE]
        return summed.flatten(1, 2), centre

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        values, mix = ctx.saved_tensors
        grad_summed, grad_centre = grad_outputs
        grad_values, grad_mix = torch.empty_like(values), torch.zeros_like(mix)
        for some in _parts(values):
            grad_map = grad_summed[some].unflatten(1, ctx.grid)
            planes = grad_map.new_zeros(POSITIONS, *grad_map.shape)
            for position in range(POSITIONS):
                here, there = _overlap(position, ctx.grid)
                planes[position][there] = grad_map[here]
            mixed = planes.flatten(2, 3)  # [K, part of B, G, E]
            mixed[CENTRE] += grad_centre[some]
            grad_values[some] = torch.tensordot(mixed, mix, dims=([0], [1])).transpose(2, 3)
            grad_mix += torch.tensordot(values[some], mixed, dims=([0, 1, 3], [1, 2, 3]))
        return grad_values, grad_mix, None, None


def _parts(values: Tensor) -> list[slice]:
    """Return slices of a batch of values [B, G, H, E] so small that nine maps of one are about as large as them all."""
    images = len(values)
    size = max(1, images * values.shape[2] // POSITIONS)
    return [slice(start, start + size) for start in range(0, images, size)]


def _overlap(position: int, grid: tuple[int, int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return which part of a map [B, height, width, E] a kernel position writes to, and which part it reads."""
    height, width = grid
    row, column = offsets(position)
    here = (slice(max(0, -row), height - max(0, row)), slice(max(0, -column), width - max(0, column)))
    there = (slice(max(0, row), height + min(0, row)), slice(max(0, column), width + min(0, column)))
    return (slice(None), *here), (slice(None), *there)


def _out_bias(weights: AttentionWeights) -> Tensor:
    if weights.out_bias is None:
        return weights.out_weight.new_zeros(weights.out_weight.shape[0])
    return weights.out_bias
