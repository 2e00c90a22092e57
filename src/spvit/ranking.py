"""Which inputs of a linear layer matter: ranked by what remains after the others have been fitted to make up for them.

Shapes: K inputs (an FFN's hidden units), D outputs.
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
    """All inputs, the most needed first."""
    errors: tuple[float, ...]
    """By how many inputs are kept, 0 to K: the mean squared error of the outputs, summed over them, after repair."""


def rank_units(covariance: Tensor, out_weight: Tensor, ridge: float) -> Ranking:
    """Return a ranking by backward elimination, each time of those whose loss the rest repairs best.

    With H the inverse covariance of the inputs that are left and W their weights as repaired so far, giving up the set
    R costs tr(W_R H_RR^-1 W_R^T), and leaves W_K - W_R H_RR^-1 H_RK and H_KK - H_KR H_RR^-1 H_RK (optimal brain
    surgeon for a linear layer). Inputs leave in up to 64 groups, those with the least loss taken alone first.

    Args:
        covariance: of the inputs, [K, K].
        out_weight: [D, K].
        ridge: relative to the mean variance.
    """
    units = len(covariance)
    inverse = torch.cholesky_inverse(cholesky(covariance.double(), ridge))
    weight = out_weight.detach().double()
    left = torch.arange(units, device=covariance.device)
    size = max(1, units // STEPS)
    removed: list[int] = []
    errors = [0.0]
    while len(left):
        alone = weight.square().sum(0) / inverse.diagonal()
        order = alone.argsort()
        going, staying = order[:size], order[size:].sort().values
        inner = torch.cholesky_solve(weight[:, going].T, torch.linalg.cholesky(inverse[going][:, going])).T
        lost = float((inner * weight[:, going]).sum())
        removed += left[going].tolist()
        # Within a group the loss is shared out evenly; widths are multiples of a group in large layers anyway.
        base = errors[-1]
        errors += [base + lost * (index + 1) / len(going) for index in range(len(going))]
        weight = weight[:, staying] - inner @ inverse[going][:, staying]
        solved = torch.cholesky_solve(inverse[going][:, staying], torch.linalg.cholesky(inverse[going][:, going]))
        inverse = inverse[staying][:, staying] - inverse[staying][:, going] @ solved
        left = left[staying]
    return Ranking(tuple(reversed(removed)), tuple(reversed(errors)))
