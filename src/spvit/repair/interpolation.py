"""Scores of all choices of a site from those of a few measured ones, and from what each choice misses of its layer.

Divergence grows with a layer's error nearly in proportion while both are small, so lines go through logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from spvit.architecture import Attention
from spvit.repair.errors import Missed

FLOOR = 1e-12
DISTINCT = 1e-3
"""Points closer than this in log error are merged; a line through them would be noise."""
LARGEST = 100.0
"""Bound of the logarithm of a divergence, where a line is prolonged."""
MEASURED_RANKS = (1 / 8, 1 / 2)
"""Shares of the head width at which narrower queries and keys, and narrower values, are measured, or the nearest."""


def measured_choices(errors: Mapping[Attention, Missed], head_width: int) -> list[Attention]:
    """Return the narrower layers whose divergence is measured: in ranks of either kind alone, or in heads alone."""
    chosen: list[Attention] = []
    ranks = range(1, head_width)
    for narrow in ([Attention(query_key_rank=rank) for rank in ranks], [Attention(value_rank=rank) for rank in ranks]):
        some = [(rank, kept) for rank, kept in zip(ranks, narrow) if kept in errors]
        wishes = [share * head_width for share in MEASURED_RANKS] if some else []
        chosen += [min(some, key=lambda pair: abs(pair[0] - wish))[1] for wish in wishes]
    fewer = sorted((kept.heads for kept in errors if kept.heads and kept == Attention(heads=kept.heads)), key=len)
    chosen += [Attention(heads=fewer[(len(fewer) - 1) // 2])] if fewer else []
    return list(dict.fromkeys(chosen))


def by_errors(measured: Mapping[Attention, float], errors: Mapping[Attention, Missed]) -> dict[Attention, float]:
    """Return scores of all narrower layers, from those of some and what each misses of the dense layer's output.

    What queries and keys miss and what values and heads miss add up, and each tells its own part of the divergence.
    """
    parts = []
    for name in ("logits", "outputs"):
        found = [getattr(errors[kept], name) for kept in errors]
        points = [(getattr(errors[kept], name), score) for kept, score in measured.items()]
        parts.append(divergences(found, [(error, score) for error, score in points if error > 0]))
    return {**{kept: max(sum(own), FLOOR) for kept, *own in zip(errors, *parts)}, **measured}


def with_all_ranks(narrow: Mapping[Attention, float], ranks: Sequence[int]) -> list[tuple[Attention, float]]:
    """Return the candidates with those of equal ranks between, on lines through rank and log score."""
    known = {rank: math.log(narrow[kept]) for rank in ranks if (kept := Attention.narrow(rank)) in narrow}
    if not known:
        return list(narrow.items())
    between = [rank for rank in ranks if rank not in known]
    scores = [math.exp(on_lines(rank, list(known), list(known.values()))) for rank in between]
    return [*zip(map(Attention.narrow, between), scores), *narrow.items()]


def interpolated_widths(points: list[tuple[int, float]], errors: Sequence[float]) -> tuple[float, ...]:
    """Return scores by width, from some measured divergences and the error after repair, which is known for all."""
    if not points:
        # A single unit: there is nothing between keeping it and having no FFN, which no decision takes.
        return (*[math.inf] * (len(errors) - 1), 0.0)
    scores = divergences(errors, [(errors[width], divergence) for width, divergence in points])
    scores[-1] = 0.0
    for width in reversed(range(len(scores) - 1)):
        # Nor is it as good to be narrower, so that what a budget leaves is spent on units.
        scores[width] = max(scores[width], scores[width + 1]) + FLOOR / len(scores)
    return tuple(scores)


def divergences(errors: Sequence[float], measured: Sequence[tuple[float, float]]) -> list[float]:
    """Return divergences of the network's outputs by the errors of a layer's, from some (error, divergence) measured.

    On lines through their logarithms: the smaller the error the nearer the divergence is to proportional.
    """
    xs: list[float] = []
    ys: list[float] = []
    for error, divergence in sorted(measured):
        # More error is never better; where the images say so it is noise, and prolonged it would grow without bounds.
        x, y = math.log(max(error, FLOOR)), max([math.log(divergence), *ys[-1:]])
        if xs and x - xs[-1] < DISTINCT:
            ys[-1] = y
        else:
            xs.append(x)
            ys.append(y)
    if not xs:
        return [0.0] * len(errors)
    logarithms = [min(on_lines(math.log(max(error, FLOOR)), xs, ys), LARGEST) for error in errors]
    return [math.exp(value) if error > 0 else 0.0 for value, error in zip(logarithms, errors)]


def on_lines(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the value at x of the lines through points with ascending xs, the outer ones prolonged."""
    if len(xs) == 1:
        return ys[0] + x - xs[0]  # proportional, if these are logarithms
    upper = next((index for index, known in enumerate(xs) if known >= x), len(xs) - 1)
    upper = max(1, upper)
    lower = upper - 1
    share = (x - xs[lower]) / (xs[upper] - xs[lower])
    return ys[lower] + share * (ys[upper] - ys[lower])
