"""The kernel algebra: the two routes (mixing values, mixing weights) agree with each other and with the formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spvit.hosts.weights import AttentionWeights
from spvit.replacements import kernels
from tiny import assert_all_close, assert_close

HEADS, WIDTH, DIM = 3, 4, 12
GRIDS = [(3, 5), (4, 4), (1, 6), (2, 1), (1, 1)]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _weights(biases: bool = True) -> AttentionWeights:
    unused = _normal(HEADS, WIDTH, DIM, seed=20)
    return AttentionWeights(
        unused,
        None,
        unused,
        None,
        _normal(HEADS, WIDTH, DIM, seed=1),
        _normal(HEADS, WIDTH, seed=2) if biases else None,
        _normal(DIM, HEADS, WIDTH, seed=3),
        _normal(DIM, seed=4) if biases else None,
    )


def _mix() -> Tensor:
    return kernels.head_mix(_normal(HEADS, 9, seed=5), 0.5)


def test_positions_are_column_major_around_the_centre() -> None:
    assert [kernels.offsets(p) for p in range(9)] == [
        (-1, -1),
        (0, -1),
        (1, -1),
        (-1, 0),
        (0, 0),
        (1, 0),
        (-1, 1),
        (0, 1),
        (1, 1),
    ]
    assert kernels.offsets(kernels.CENTRE) == (0, 0)
    assert kernels.POSITIONS == 9


@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
def test_head_mix_is_a_softmax_over_heads(temperature: float) -> None:
    head_logits = 1 + 0.01 * _normal(HEADS, 9)
    mix = kernels.head_mix(head_logits, temperature)
    exponentials = torch.exp((head_logits - 1) / temperature)
    assert_close(mix, exponentials / exponentials.sum(0))
    assert_close(mix.sum(0), torch.ones(9, dtype=torch.float64))


def test_equal_head_logits_average_the_heads() -> None:
    assert_close(kernels.head_mix(torch.ones(4, 9), 0.01), torch.full((4, 9), 0.25))


@pytest.mark.parametrize("biases", [True, False])
def test_conv3_weights_are_the_sums_of_the_formula(biases: bool) -> None:
    weights, mix = _weights(biases), _mix()
    bottleneck = kernels.conv3_weights(mix, weights)
    bias, out = torch.zeros(WIDTH, dtype=torch.float64), torch.zeros(DIM, WIDTH, dtype=torch.float64)
    for p in range(9):
        kernel = sum(mix[i, p] * weights.value_weight[i] for i in range(HEADS))
        assert_close(bottleneck.in_weight[:, :, p % 3, p // 3], kernel)
        for i in range(HEADS):
            out += mix[i, p] * weights.out_weight[:, i]
            bias += 0 if weights.value_bias is None else mix[i, p] * weights.value_bias[i]
    assert_close(bottleneck.in_bias, bias)
    assert_close(bottleneck.out_weight, out)
    assert_close(bottleneck.out_bias, torch.zeros_like(bottleneck.out_bias) if not biases else weights.out_bias)


@pytest.mark.parametrize("biases", [True, False])
def test_conv1_weights_are_the_centre_alone(biases: bool) -> None:
    weights, mix = _weights(biases), _mix()
    bottleneck = kernels.conv1_weights(mix, weights)
    assert_close(bottleneck.in_weight, sum(mix[i, 4] * weights.value_weight[i] for i in range(HEADS)))
    assert_close(bottleneck.out_weight, sum(mix[i, 4] * weights.out_weight[:, i] for i in range(HEADS)))
    if biases:
        assert_close(bottleneck.in_bias, sum(mix[i, 4] * weights.value_bias[i] for i in range(HEADS)))
        assert_close(bottleneck.out_bias, weights.out_bias)
    else:
        assert not bottleneck.in_bias.any()
        assert not bottleneck.out_bias.any()


def _convolved(x: Tensor, in_weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return x [B, G, D] convolved with a 3 x 3 or 1 x 1 kernel without bias, [B, G, E]."""
    kernel = in_weight if in_weight.dim() == 4 else in_weight[:, :, None, None]
    feature_map = x.unflatten(1, grid).permute(0, 3, 1, 2)
    return F.conv2d(feature_map, kernel, padding=kernel.shape[-1] // 2).permute(0, 2, 3, 1).flatten(1, 2)


@pytest.mark.parametrize("images", [1, 2, 7])
@pytest.mark.parametrize("grid", GRIDS)
def test_convolving_values_is_convolving_with_mixed_weights(grid: tuple[int, int], images: int) -> None:
    tokens = grid[0] * grid[1]
    leaves = {
        "x": _normal(images, tokens, DIM, seed=6),
        "w": _normal(HEADS, WIDTH, DIM, seed=7),
        "mix": _mix(),
    }
    gradients, outputs = [], []
    for by_values in (True, False):
        x, w, mix = (leaf.clone().requires_grad_() for leaf in leaves.values())
        weights = replace(_weights(biases=False), value_weight=w)
        if by_values:
            three, one = kernels.convolve_values(torch.einsum("bgd,hed->bghe", x, w), mix, grid)
        else:
            three = _convolved(x, kernels.conv3_weights(mix, weights).in_weight, grid)
            one = _convolved(x, kernels.conv1_weights(mix, weights).in_weight, grid)
        loss = (three * _normal(*three.shape, seed=8)).sum() + (one * _normal(*one.shape, seed=9)).sum()
        loss.backward()
        outputs.append((three.detach(), one.detach()))
        gradients.append({"x": x.grad, "w": w.grad, "mix": mix.grad})
    for own, expected in zip(*outputs):
        assert_close(own, expected)
    assert_all_close(*gradients)


@pytest.mark.parametrize("used", [0, 1])
def test_either_convolution_of_values_may_go_unused(used: int) -> None:
    values, mix = _normal(2, 6, HEADS, WIDTH), _mix()
    assert torch.autograd.gradcheck(
        lambda *leaves: kernels.convolve_values(*leaves, (2, 3))[used],
        (values.requires_grad_(), mix.requires_grad_()),
    )
