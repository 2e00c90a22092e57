"""Streamed moments against whole matrices, and the least-squares maps against direct solves and brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import reference
from spvit.errors import CalibrationError
from spvit.moments import (
    GRAM_COLUMNS,
    RIDGE,
    WANTED_TOKENS,
    Moments,
    cholesky,
    damped,
    low_rank_regression,
    regression,
    ridge_for,
)
from tiny import assert_close, assert_differ

DOUBLE = torch.float64


def data(tokens: int = 90, inputs: int = 6, outputs: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return correlated inputs with means, and outputs that follow from them in part."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=DOUBLE)

    x = noise(tokens, inputs) @ noise(inputs, inputs) + 2 * noise(inputs)
    return x, x @ noise(inputs, outputs) + 3 * noise(outputs) + noise(tokens, outputs)


def gathered(x: Tensor, y: Tensor | None = None, sizes: tuple[int, ...] = ()) -> Moments:
    moments = Moments()
    parts = list(sizes) or [len(x)]
    for xs, ys in zip(x.split(parts), y.split(parts) if y is not None else [None] * len(parts)):
        moments.add(xs, ys)
    return moments


@pytest.mark.parametrize("sizes", [(90,), (1, 59, 30), (45, 45)])
def test_streamed_moments_are_those_of_all_tokens(sizes: tuple[int, ...]) -> None:
    x, y = data()
    moments = gathered(x.view(-1, 1, 6), y.view(-1, 1, 5), sizes)
    assert (moments.count, moments.inputs) == (90, 6)
    joint = torch.cov(torch.cat([x, y], dim=1).T, correction=0)
    assert_close(moments.mean_x, x.mean(0))
    assert_close(moments.mean_y, y.mean(0))
    assert_close(moments.covariance, joint[:6, :6])
    assert_close(moments.products(centred=True)[1], joint[:6, 6:])
    assert_close(moments.products(centred=False)[0], x.T @ x / 90)
    assert_close(moments.products(centred=False)[1], x.T @ y / 90)


def test_prefix_tokens_weigh_more_than_all_others() -> None:
    x, y = (part.unflatten(0, (9, 10)) for part in data())  # nine images of two prefix tokens and eight others
    found = Moments()
    for images in (slice(4), slice(4, 9)):
        found.add(x[images], y[images], prefix=2)
    expected = Moments()
    for part in (slice(2, 10), *[slice(2)] * 36):
        expected.add(x[:, part], y[:, part])
    assert (found.count, found.tokens) == (expected.count, 90)
    weights = torch.tensor([36.0] * 18 + [1.0] * 72)
    assert found.effective == pytest.approx(float(weights.sum() ** 2 / weights.square().sum()))
    for own, other in zip(found.products(centred=True), expected.products(centred=True)):
        assert_close(own, other)
    for own, other in ((found.mean_x, expected.mean_x), (found.mean_y, expected.mean_y)):
        assert_close(own, other)


def test_moments_of_wide_inputs_are_whole() -> None:
    x, y = data(tokens=50, inputs=2 * GRAM_COLUMNS + 7)
    moments = gathered(x, y)
    assert_close(moments.covariance, torch.cov(x.T, correction=0))
    assert_close(moments.products(centred=True)[1], x.sub(x.mean(0)).T @ y / 50)


@pytest.mark.parametrize("kept", [(1, 4, 5), (0,)])
def test_what_is_left_out_is_as_if_gathered(kept: tuple[int, ...]) -> None:
    x, _ = data()
    weight = data(5)[0]  # [5, 6]
    others = [unit for unit in range(6) if unit not in kept]
    found = gathered(x, sizes=(45, 45)).left_out(kept, weight)
    expected = gathered(x[:, list(kept)], x[:, others] @ weight[:, others].T)
    assert (found.count, found.inputs) == (90, len(kept))
    for centred in (True, False):
        for own, other in zip(found.products(centred), expected.products(centred)):
            assert_close(own, other)
    assert_close(found.mean_y, expected.mean_y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_means_cost_no_digits(dtype: torch.dtype) -> None:
    x = data()[0]
    shifted = (x + 1000).to(dtype).float() if dtype == torch.float32 else (x + 8).to(dtype)
    moments = gathered(shifted, sizes=(30, 60))
    exact = torch.cov(shifted.double().T, correction=0)
    assert (moments.covariance - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("place", ["x", "y"])
def test_values_that_are_not_finite_are_refused(place: str, value: float) -> None:
    x, y = (tensor.float() for tensor in data())
    (x if place == "x" else y)[70, 2] = value
    x = x * 1e30 if value == 1e30 else x  # whose products overflow
    with pytest.raises(CalibrationError, match="activations of the calibration images are not finite; check the model"):
        gathered(x, y, (45, 45))


@pytest.mark.parametrize("ridge", [1e-4, 0.3])
def test_regression_is_the_direct_ridge_solution_and_its_optimum(ridge: float) -> None:
    x, y = data()
    moments = gathered(x, y)
    weight = regression(*moments.products(centred=True), ridge).T
    expected, bias = reference.ridge_fit(x, y, ridge)
    assert_close(weight, expected)
    level = reference.penalty(x, ridge)
    best = reference.ridge_loss(x, y, weight, bias, level)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(20):
            step = size * torch.randn(weight.shape, generator=generator, dtype=DOUBLE)
            assert reference.ridge_loss(x, y, weight + step, bias - step @ x.mean(0), level) > best
            assert reference.ridge_loss(x, y, weight, bias + step[:, 0], level) > best


@pytest.mark.parametrize("rank", [1, 2, 4, 5])
@pytest.mark.parametrize("ridge", [1e-4, 0.3])
def test_low_rank_regression_is_the_best_of_its_rank(ridge: float, rank: int) -> None:
    x, y = data()
    moments = gathered(x, y)
    inward, outward = low_rank_regression(*moments.products(centred=True), ridge, rank)
    assert (inward.shape, outward.shape) == ((6, rank), (rank, 5))
    weight = (inward @ outward).T
    expected, bias = reference.low_rank_ridge_fit(x, y, ridge, rank)
    assert_close(weight, expected)
    level = reference.penalty(x, ridge)
    best = reference.ridge_loss(x, y, weight, bias, level)
    xc, yc = x - x.mean(0), y - y.mean(0)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):  # alternating least squares, from anywhere, ends no lower
        left = torch.randn(5, rank, generator=generator, dtype=DOUBLE)
        for _ in range(200):
            left = torch.linalg.qr(left).Q
            right = torch.linalg.solve(xc.T @ xc / 90 + level * torch.eye(6, dtype=DOUBLE), xc.T @ yc @ left / 90).T
            inner = right @ (xc.T @ xc / 90 + level * torch.eye(6, dtype=DOUBLE)) @ right.T
            left = (torch.linalg.solve(inner, right @ xc.T @ yc / 90)).T
        found = reference.ridge_loss(x, y, left @ right, y.mean(0) - left @ right @ x.mean(0), level)
        assert found >= best - 1e-9 * abs(best)
    if rank == 5:
        assert_close(weight, reference.ridge_fit(x, y, ridge)[0])
    elif rank < 4:
        assert_differ(weight, reference.ridge_fit(x, y, ridge)[0])


def test_the_ridge_grows_as_tokens_get_few_until_they_are_refused() -> None:
    x, _ = data(tokens=2 * WANTED_TOKENS * 6)
    assert ridge_for(gathered(x)) == RIDGE
    assert ridge_for(gathered(x[: WANTED_TOKENS * 6])) == RIDGE
    assert ridge_for(gathered(x[:12])) == pytest.approx(RIDGE + 0.01)  # half of the wanted ones: one part is missing
    ridges = [ridge_for(gathered(x[:count])) for count in range(2, 30)]
    assert ridges == sorted(ridges, reverse=True)
    assert ridge_for(gathered(x[:5]), inputs=20) == pytest.approx(RIDGE + 0.01 * 15)
    with pytest.raises(
        CalibrationError, match=r"5 calibration tokens are too few for a layer of 21 inputs: at least 6 "
    ):
        ridge_for(gathered(x[:5]), inputs=21)
    with pytest.raises(CalibrationError, match="6 are needed, 84 or more are wanted; give more calibration images"):
        ridge_for(gathered(x[:5]), inputs=21)


def test_a_rank_above_the_outputs_is_filled_with_zeros() -> None:
    x, y = data()
    moments = gathered(x, y)
    inward, outward = low_rank_regression(*moments.products(centred=True), RIDGE, 8)
    assert (inward.shape, outward.shape) == ((6, 8), (8, 5))
    whole = low_rank_regression(*moments.products(centred=True), RIDGE, 5)
    assert_close(inward @ outward, whole[0] @ whole[1])


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_nothing_follows_from_constant_inputs(dtype: torch.dtype) -> None:
    y = data()[1].to(dtype)
    x = torch.full((90, 6), 0.1, dtype=dtype) * torch.arange(6)
    moments = gathered(x, y, (45, 45))
    weight = regression(*moments.products(centred=True), RIDGE)
    inward, outward = low_rank_regression(*moments.products(centred=True), RIDGE, 2)
    for found in (weight, inward @ outward):
        assert found.abs().max() < 1e-4
    assert_close(moments.mean_y, y.double().mean(0), scale=1e4 if dtype == torch.float32 else None)


def test_no_inputs_at_all_are_a_regression_too() -> None:
    moments = gathered(torch.zeros(9, 0), torch.ones(9, 3))
    assert ridge_for(moments) == RIDGE
    assert regression(*moments.products(centred=True), RIDGE).shape == (0, 3)


@pytest.mark.parametrize("ridge", [1e-7, RIDGE])
@pytest.mark.parametrize("mean", [0.0, 50.0])
def test_covariances_made_singular_by_few_directions_are_factorised(mean: float, ridge: float) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(8, 64, generator=generator)
    moments = gathered(torch.randn(6000, 8, generator=generator) @ basis + mean)
    covariance = moments.covariance
    assert torch.linalg.eigvalsh(covariance)[0] < 0  # single precision leaves it indefinite
    factor = cholesky(covariance, ridge)
    error = (factor @ factor.T - covariance).abs().max()
    assert error <= max(ridge, 1e-4) * covariance.diagonal().mean() * 1.01
    well = damped(covariance, RIDGE)
    assert torch.equal(cholesky(well, RIDGE), torch.linalg.cholesky(damped(well, RIDGE)))  # no more than is needed


def test_a_covariance_that_cannot_be_factorised_is_refused() -> None:
    with pytest.raises(CalibrationError, match="a covariance of activations cannot be factorised; check the model's"):
        cholesky(torch.full((2, 2), float("nan"), dtype=DOUBLE), RIDGE)
