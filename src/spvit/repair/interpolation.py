"""Scores of all choices of a site from those of a few measured ones, and from what each choice misses of its layer.

Where what is missed is taken in the metric of the outputs' gradients, scores are nearly proportional to it. How much
they are of it is known at the measured choices, and on lines between them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spvit.architecture import Attention

FLOOR = 1e-12
MEASURED = (1 / 4, 1 / 2, 3 / 4)
"""Which of the narrower layers are measured, in the order of what they miss."""


def measured_choices(errors: Mapping[Attention, float]) -> list[Attention]:
    """Return the narrower layers that are measured."""
    ordered = sorted(errors, key=errors.__getitem__)
    return list(dict.fromkeys(ordered[int(share * len(ordered))] for share in MEASURED if ordered))


def by_errors(errors: Sequence[float], measured: Mapping[int, float]) -> list[float]:
    """Return scores of all choices, from what each misses, and from the scores of some by their number."""
    found = np.log(np.maximum(errors, FLOOR))
    points = sorted((found[index], math.log(score) - found[index]) for index, score in measured.items())
    if not points:
        return [0.0] * len(errors)
    known, shares = zip(*points)
    return [float(score) for score in np.exp(np.interp(found, known, shares) + found)]


def with_all_ranks(narrow: Mapping[Attention, float], ranks: Sequence[int]) -> list[tuple[Attention, float]]:
    """Return the candidates with those of equal ranks between, on lines through rank and log score."""
    known = {rank: math.log(narrow[kept]) for rank in ranks if (kept := Attention.narrow(rank)) in narrow}
    between = [rank for rank in ranks if known and rank > min(known) and rank not in known]
    logarithms: Any = np.interp(between, list(known), list(known.values())) if between else []
    return [*zip(map(Attention.narrow, between), map(math.exp, logarithms)), *narrow.items()]


def interpolated_widths(measured: Mapping[int, float], errors: Sequence[float]) -> tuple[float, ...]:
    """Return scores by width, from some measured ones and the error after repair, which is known for all."""
    if not measured:
        # A single unit: there is nothing between keeping it and having no FFN, which no decision takes.
        return (*[math.inf] * (len(errors) - 1), 0.0)
    scores = by_errors(errors, measured)
    scores[-1] = 0.0
    for width in reversed(range(len(scores) - 1)):
        # Nor is it as good to be narrower, so that what a budget leaves is spent on units.
        scores[width] = max(scores[width], scores[width + 1]) + FLOOR / len(scores)
    return tuple(scores)
