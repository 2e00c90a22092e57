"""Second moments of activations, gathered in a stream, and the least-squares maps that follow from them: pure algebra.

Shapes: n tokens, X inputs, Y outputs of a linear map. Everything is solved in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spvit.errors import CalibrationError

RIDGE = 1e-4
WANTED_TOKENS = 4
"""Tokens for every input, below which the ridge grows: moments from fewer are noise in their smallest directions."""
PREFIX_WEIGHT = 9
"""Weight of prefix tokens relative to all others together, where nothing reads those: they decide what few images leave
open."""
GRAM_COLUMNS = 128
"""Columns whose products with all later ones are taken at once: half of the products would be known twice, and narrow
ones waste time on small products."""

NOT_FINITE = "the activations of the calibration images are not finite; check the model's weights and the images"


class Moments:
    """First and second moments of inputs x and, if given, their products with outputs y, summed over tokens.

    Products are taken of the differences to the first batch's mean, which keeps digits where means are large; of
    moments that are to be added to others, to the mean that those took first.
    """

    def __init__(self, beside: Moments | None = None) -> None:
        self.count, self._squares, self.tokens = 0.0, 0.0, 0  # sums of weights and of their squares, and tokens
        self._origin_x: Tensor | None = None if beside is None else beside._origin_x
        self._origin_y: Tensor | None = None if beside is None else beside._origin_y
        self._sums: list[Tensor] = []  # of x, of y, of x x^T (right from the diagonal on), and of x y^T

    def add(self, x: Tensor, y: Tensor | None = None, prefix: int = 0) -> None:
        """Take in x: [..., X] and y: [..., Y]. Raises CalibrationError when a value is not finite.

        prefix: first tokens of x [B, N, X] that are to weigh nine times all others together; 0: all weigh alike.
        """
        images, weight = len(x), PREFIX_WEIGHT * (x.shape[1] - prefix) / prefix if prefix else 1.0
        x, y = _flat(x), _flat(x[..., :0] if y is None else y)
        if self._origin_x is None or self._origin_y is None:
            self._origin_x, self._origin_y = x.mean(0), y.mean(0)
        x, y, roots = x - self._origin_x, y - self._origin_y, x.new_ones(len(x))
        if prefix:
            roots.view(images, -1)[:, :prefix] = weight**0.5
            x, y = x * roots[:, None], y * roots[:, None]
        width, outputs = x.shape[1], y.shape[1]
        shapes = (width, outputs, (width, width), (width, outputs))
        self._sums = self._sums or [x.new_zeros(shape, dtype=torch.float64) for shape in shapes]
        sum_x, sum_y, upper, cross = self._sums
        sum_x.add_(roots @ x)
        sum_y.add_(roots @ y)
        cross.add_(x.T @ y)
        for start in range(0, width, GRAM_COLUMNS):
            some = x[:, start : start + GRAM_COLUMNS]
            upper[start : start + GRAM_COLUMNS, start:].add_(some.T @ x[:, start:])
        weighted, others = images * prefix, len(x) - images * prefix
        self.count += others + weight * weighted
        self._squares += others + weight**2 * weighted
        self.tokens += len(x)
        if not (upper.diagonal().isfinite().all() and cross.isfinite().all()):
            raise CalibrationError(NOT_FINITE)

    def left_out(self, kept: Sequence[int], weight: Tensor) -> Moments:
        """Return the moments of some inputs and, as outputs, of what all others add through a linear map [Y, X]."""
        assert self._origin_x is not None
        kept, others = list(kept), sorted(set(range(self.inputs)) - set(kept))
        outward = weight[:, others].T.double()
        sum_x, second = self._sums[0], self._second
        part = Moments()
        part.count, part._squares, part.tokens = self.count, self._squares, self.tokens
        part._origin_x, part._origin_y = self._origin_x[kept], self._origin_x[others].double() @ outward
        part._sums = [sum_x[kept], sum_x[others] @ outward, second[kept][:, kept], second[kept][:, others] @ outward]
        return part

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of the tokens of both; one was made beside the other."""
        both = Moments(self)
        both.count, both._squares = self.count + other.count, self._squares + other._squares
        both.tokens = self.tokens + other.tokens
        both._sums = [own + others for own, others in zip(self._sums, other._sums)]
        return both

    def plus(self, weight: Tensor, constant: Tensor) -> Moments:
        """Return the moments of the first Y outputs with x @ weight + constant added. weight: [X, Y]; constant: [Y]."""
        assert self._origin_x is not None
        assert self._origin_y is not None
        sum_x, sum_y, upper, cross = self._sums
        some, part = slice(len(constant)), Moments(self)
        part.count, part._squares, part.tokens = self.count, self._squares, self.tokens
        part._origin_y = self._origin_y[some] + self._origin_x.double() @ weight + constant
        part._sums = [sum_x, sum_y[some] + sum_x @ weight, upper, cross[:, some] + self._second @ weight]
        return part

    @property
    def _second(self) -> Tensor:
        """Sums of the inputs' products, [X, X]; those kept are right from the diagonal on."""
        upper = self._sums[2]
        return upper.triu() + upper.triu(1).T

    @property
    def inputs(self) -> int:
        """How many inputs there are."""
        return len(self._sums[0])

    @property
    def effective(self) -> float:
        """How many tokens of one weight say as much: Kish's effective sample size."""
        return self.count**2 / self._squares

    @property
    def mean_x(self) -> Tensor:
        """[X]."""
        assert self._origin_x is not None
        return self._origin_x.double() + self._sums[0] / self.count

    @property
    def mean_y(self) -> Tensor:
        """[Y]."""
        assert self._origin_y is not None
        return self._origin_y.double() + self._sums[1] / self.count

    def products(self, centred: bool, about: Moments | None = None) -> tuple[Tensor, Tensor]:
        """Return what a regression takes, [X, X] and [X, Y]: about the means, or about zero where no bias follows.

        about: whose means these are; None: its own.
        """
        x, y = self._sums[0] / self.count, self._sums[1] / self.count
        covariance = self._second / self.count - torch.outer(x, x)
        cross = self._sums[3] / self.count - torch.outer(x, y)
        if centred and about is None:
            return covariance, cross
        x, y = self.mean_x, self.mean_y
        if centred and about is not None:
            x, y = x - about.mean_x, y - about.mean_y
        return covariance + torch.outer(x, x), cross + torch.outer(x, y)

    @property
    def covariance(self) -> Tensor:
        """Covariance of the inputs, [X, X]."""
        return self.products(centred=True)[0]


def _flat(tensor: Tensor) -> Tensor:
    """Return vectors [n, width] of at least single precision."""
    return tensor.detach().flatten(0, -2).to(torch.promote_types(tensor.dtype, torch.float32))


def ridge_for(moments: Moments, inputs: int | None = None) -> float:
    """Return the ridge for a number of inputs, relative to their mean variance: more than asked when tokens are few.

    Raises:
        CalibrationError: there are fewer tokens than a quarter of the inputs, which says nothing about most of them.
    """
    inputs = moments.inputs if inputs is None else inputs
    if 4 * moments.tokens < inputs:
        raise CalibrationError(
            f"{moments.tokens} calibration tokens are too few for a layer of {inputs} inputs: at least "
            f"{-(-inputs // 4)} are needed, {WANTED_TOKENS * inputs} or more are wanted; give more calibration images"
        )
    missing = max(0.0, WANTED_TOKENS * inputs / moments.effective - 1)
    return RIDGE + 0.01 * missing


def damped(covariance: Tensor, ridge: float) -> Tensor:
    """Return a covariance [X, X] plus ridge x its mean diagonal on the diagonal; always positive definite."""
    level = covariance.diagonal().mean()
    # Where nothing varies at all, any positive number says that nothing follows from these inputs.
    level = torch.where(level > 0, ridge * level, torch.ones_like(level))
    return covariance + level * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)


def cholesky(covariance: Tensor, ridge: float) -> Tensor:
    """Return the Cholesky factor of a damped covariance, more damped where rounding has left it indefinite."""
    for step in range(7):
        factor, failed = torch.linalg.cholesky_ex(damped(covariance, ridge * 10**step))
        if covariance.is_meta or not failed:
            return factor
    raise CalibrationError("a covariance of activations cannot be factorised; check the model's weights and the images")


def regression(covariance: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Return the map [X, Y] that predicts outputs from inputs with the least squared error plus the ridge's penalty.

    covariance: [X, X]; cross: [X, Y]; ridge: relative to the mean variance of the inputs.
    """
    return torch.cholesky_solve(cross, cholesky(covariance, ridge))


def low_rank_regression(covariance: Tensor, cross: Tensor, ridge: float, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best such map of a rank as two: [X, rank] and then [rank, Y] (reduced-rank ridge regression).

    The optimum is the full ridge solution projected on the leading directions of what it predicts; zeros fill a rank
    above Y.
    """
    factor = cholesky(covariance, ridge)
    full = torch.cholesky_solve(cross, factor)  # [X, Y]
    predicted = factor.T @ full
    directions = torch.linalg.eigh(predicted.T @ predicted).eigenvectors.flip(1)[:, :rank]  # [Y, rank]
    directions = nn.functional.pad(directions, (0, rank - directions.shape[1]))
    return full @ directions, directions.T
