"""Which inputs of a linear layer matter: ranked by what remains after the others have been fitted to make up for them.

Inputs leave by backward elimination. With H the inverse covariance of the inputs that are left and W their weights as
repaired so far, giving up the set R costs tr(W_R H_RR^-1 W_R^T), and leaves W_K - W_R H_RR^-1 H_RK and
H_KK - H_KR H_RR^-1 H_RK (optimal brain surgeon for a linear layer).

Shapes: K inputs (an FFN's hidden units, or the V dimensions of each of H heads), D outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spvit.moments import cholesky

STEPS = 64


@dataclass(frozen=True)
class Ranking:
    """The order in which inputs are given up, and what is lost then."""

    units: tuple[int, ...]
    """All inputs or, of heads, all heads, the most needed first."""
    errors: tuple[float, ...]
    """By how many are kept, from none to all: the mean squared error of the outputs, summed over them, after repair."""


class _Left:
    """The inputs of a linear layer that are left: their inverse covariance and their repaired weights."""

    def __init__(self, covariance: Tensor, out_weight: Tensor, ridge: float) -> None:
        self.inverse = torch.cholesky_inverse(cholesky(covariance.double(), ridge))
        self.weight = out_weight.detach().double()

    def give_up(self, going: Tensor, staying: Tensor) -> float:
        """Leave inputs [K'] out, of which the others make up what they can; return what is lost."""
        factor = torch.linalg.cholesky(self.inverse[going][:, going])
        inner = torch.cholesky_solve(self.weight[:, going].T, factor).T
        lost = float((inner * self.weight[:, going]).sum())
        self.weight = self.weight[:, staying] - inner @ self.inverse[going][:, staying]
        solved = torch.cholesky_solve(self.inverse[going][:, staying], factor)
        self.inverse = self.inverse[staying][:, staying] - self.inverse[staying][:, going] @ solved
        return lost


def rank_units(covariance: Tensor, out_weight: Tensor, ridge: float) -> Ranking:
    """Return a ranking by backward elimination, each time of those whose loss the rest repairs best.

    Inputs leave in up to 64 groups, those with the least loss taken alone first.

    Args:
        covariance: of the inputs, [K, K].
        out_weight: [D, K].
        ridge: relative to the mean variance.
    """
    units = len(covariance)
    kept = _Left(covariance, out_weight, ridge)
    left = torch.arange(units, device=covariance.device)
    size = max(1, units // STEPS)
    removed: list[int] = []
    errors = [0.0]
    while len(left):
        alone = kept.weight.square().sum(0) / kept.inverse.diagonal()
        order = alone.argsort()
        going, staying = order[:size], order[size:].sort().values
        lost = kept.give_up(going, staying)
        removed += left[going].tolist()
        # Within a group the loss is shared out evenly; widths are multiples of a group in large layers anyway.
        base = errors[-1]
        errors += [base + lost * (index + 1) / len(going) for index in range(len(going))]
        left = left[staying]
    return Ranking(tuple(reversed(removed)), tuple(reversed(errors)))


def rank_heads(covariance: Tensor, out_weight: Tensor, heads: int, ridge: float) -> Ranking:
    """Return a ranking of heads by backward elimination, each time of the one whose loss the rest repairs best.

    Args:
        covariance: of the outputs of all heads side by side, [H V, H V].
        out_weight: [D, H V].
        heads: H.
        ridge: relative to the mean variance.
    """
    kept, left = _Left(covariance, out_weight, ridge), list(range(heads))
    removed: list[int] = []
    errors = [0.0]
    while left:
        by_head = kept.weight.unflatten(1, (len(left), -1)).permute(1, 0, 2)  # [heads left, D, V]
        own = kept.inverse.unflatten(0, (len(left), -1)).unflatten(2, (len(left), -1))
        inner = torch.linalg.cholesky(own.diagonal(dim1=0, dim2=2).permute(2, 0, 1))  # [heads left, V, V]
        alone = (torch.cholesky_solve(by_head.transpose(1, 2), inner).transpose(1, 2) * by_head).sum((1, 2))
        least = int(alone.argmin())
        inputs = torch.arange(len(kept.inverse), device=covariance.device).unflatten(0, (len(left), -1))
        others = torch.arange(len(left), device=covariance.device) != least
        errors.append(errors[-1] + kept.give_up(inputs[least], inputs[others].flatten()))
        removed.append(left.pop(least))
    return Ranking(tuple(reversed(removed)), tuple(reversed(errors)))
