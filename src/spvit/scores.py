"""What each candidate of each site costs in agreement with the dense network, measured on calibration images.

A candidate is installed alone in an otherwise dense network, repaired, and the divergence of the class probabilities
from the dense ones is taken on images that the repair has not seen. So some widths of an FFN and some narrower
attention layers are measured; all others are told from what they miss of their layer's output, which is known for each.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spvit.architecture import FFN, Attention, Block, narrow_ranks
from spvit.attention_errors import Missed, attention_errors, paired_ranks
from spvit.blockwise import BATCH, Layer, advance, block_inputs, calibration_batches, evaluating, reached
from spvit.errors import CalibrationError
from spvit.hosts.base import BlockSites, Family, logits_of
from spvit.install import installed
from spvit.moments import Moments, ridge_for
from spvit.ranking import Ranking, rank_units
from spvit.repair import correct, repair_block

MEASURED_SHARES = (1 / 8, 1 / 4, 1 / 2)
"""Shares of an FFN's units at which the divergence is measured."""
MEASURED_RANKS = (1 / 8, 1 / 2)
"""Shares of the head width at which narrower queries and keys, and narrower values, are measured, or the nearest."""
MEASURING = (96, 20_000)
"""Images, or tokens of the first block if these are more images, on which divergence is measured at most: they pass
through most of the network for every candidate."""
FITTING = (256, 50_000)
"""The same for what the repair of candidates is fitted to; the repair at pruning takes all images."""
LOCAL_TOKENS = 12_000
"""Tokens, where there are so many, on which the errors of narrower layers are taken: each rank is a pass of them."""
FLOOR = 1e-12
DISTINCT = 1e-3
"""Logarithms of errors that are nearer to each other, as those of a layer that gives almost nothing, make no line."""
LARGEST = 100.0
"""Bound of the logarithm of a divergence, where a line is prolonged."""


@dataclass(frozen=True)
class BlockScores:
    """How much the network's outputs diverge for what one block may become; 0 for keeping it whole."""

    attention: tuple[tuple[Attention, float], ...]
    """Candidates with their scores."""
    ranking: Ranking
    """The FFN's units, the most needed first."""
    ffn: tuple[float, ...]
    """Scores by how many units are kept, 0 to all."""


class _Passing(nn.Module):
    """Stands where a block was and passes its first argument on, or what it has been given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: Tensor | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: [B, N, D]."""
        return x if self.given is None else self.given


class Head:
    """What a host does behind its last block, as a function of that block's output."""

    def __init__(self, host: nn.Module, blocks: Sequence[BlockSites], images: Tensor) -> None:
        self._shell = copy.deepcopy(host)
        for block in blocks:
            self._shell.set_submodule(block.path, _Passing())
        last = self._shell.get_submodule(blocks[-1].path)
        assert isinstance(last, _Passing)
        self._last = last
        self._image = images[:1]

    def __call__(self, out: Tensor) -> Tensor:
        """Return logits [B, classes] from the last block's output [B, N, D]."""
        self._last.given = out
        return logits_of(self._shell(self._image))


@dataclass(frozen=True)
class _Bench:
    """The dense network, a copy in which candidates take turns, and the dense outputs to compare with."""

    host: nn.Module
    model: nn.Module
    family: Family
    blocks: tuple[BlockSites, ...]
    head: Head
    dense_log_probabilities: list[Tensor]

    def divergence(self, index: int, inputs: list[Tensor]) -> float:
        """Return the mean divergence of the outputs when the images enter the copy at a block, in nats."""
        total, count = 0.0, 0
        for x, dense in zip(inputs, self.dense_log_probabilities):
            for number in range(index, len(self.blocks)):
                following = self.blocks[number + 1] if number + 1 < len(self.blocks) else None
                x = advance(self.model, self.blocks[number], following, x)
            found = F.log_softmax(self.head(x).double(), dim=1)
            total += float(F.kl_div(found, dense, reduction="sum", log_target=True))
            count += len(found)
        if not math.isfinite(total):
            raise CalibrationError(
                f"the model's outputs are not finite with a candidate of block {index}; check its weights"
            )
        return max(total / count, FLOOR)


def score(
    host: nn.Module,
    family: Family,
    images: Tensor | Iterable[Any],
    multiple: int,
    report: Callable[[int, int], object] | None = None,
) -> tuple[BlockScores, ...]:
    """Return the scores of every block's candidates.

    Args:
        host: the dense model.
        family: the host's.
        images: as in `blockwise.calibration_batches`; some of them fit the repairs, some others measure.
        multiple: ranks of narrow attention are multiples of it.
        report: called with (blocks scored, blocks) after each.

    Raises:
        CalibrationError: the images do not fit the host, are too few, or lead to values that are not finite.
    """
    blocks = family.blocks(host)
    with evaluating(host):
        site = blocks[0].attention
        # Of a prefix token an image has but one, and its linear map has the host's width of inputs.
        least = site.dim // 2 if site.prefix_tokens else 0
        batches = _parts(calibration_batches(images, family, host), site.prefix_tokens + math.prod(site.grid), least)
        model = copy.deepcopy(host)
        fitting, measuring = (block_inputs(host, blocks[0], part) for part in batches)
        head = Head(host, blocks, batches[0][0])
        dense = [F.log_softmax(logits_of(host(batch)).double(), dim=1) for batch in batches[1]]
        bench = _Bench(host, model, family, blocks, head, dense)
        scores = []
        for index, sites in enumerate(blocks):
            scores.append(_score_block(bench, index, fitting, measuring, multiple))
            if report is not None:
                report(index + 1, len(blocks))
            following = blocks[index + 1] if index + 1 < len(blocks) else None
            for inputs in (fitting, measuring) if following is not None else ():
                inputs[:] = [advance(host, sites, following, x) for x in inputs]
    return tuple(scores)


def _parts(batches: list[Tensor], tokens: int, least: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Return batches of the images to fit and of those to measure, each taken evenly from all: every other one of few.

    Args:
        batches: all images.
        tokens: of one image.
        least: images to fit, if there are so many.

    Raises:
        CalibrationError: there is but one image.
    """
    count = sum(len(batch) for batch in batches)
    if count < 2:
        raise CalibrationError("one calibration image is too few to fit and measure; give a few hundred or more")
    images = torch.arange(count)
    measured, fitted = (max(some, limit // tokens) for some, limit in (MEASURING, FITTING))
    fitted = max(fitted, least)
    measures = _spread(count, min(measured, count // 2))
    others = images[~measures]
    fitting = others[_spread(len(others), min(fitted, len(others)))]
    return _taken(batches, fitting), _taken(batches, images[measures])


def _spread(count: int, marked: int) -> Tensor:
    """Return a mask [count] in which so many entries are marked, evenly."""
    passed = torch.arange(count + 1) * marked // count
    return passed[1:] > passed[:-1]


def _taken(batches: list[Tensor], images: Tensor) -> list[Tensor]:
    """Return some images, by their ascending numbers among those of all batches, in full batches again."""
    starts = itertools.accumulate((len(batch) for batch in batches), initial=0)
    own = [images[(images >= start) & (images < start + len(batch))] - start for start, batch in zip(starts, batches)]
    return list(torch.cat([batch[index.to(batch.device)] for index, batch in zip(own, batches)]).split(BATCH))


def _score_block(
    bench: _Bench, index: int, fitting: list[Tensor], measuring: list[Tensor], multiple: int
) -> BlockScores:
    sites = bench.blocks[index]
    layer = Layer(bench.model, bench.host, bench.family, sites, fitting, fitting).knowing(sites.attention.path)
    units = sites.ffn.units

    def measured(kept: Block, fit: Callable[[Block], object]) -> float:
        """Install, repair and measure what a block may keep, and put the copy's block back."""
        with installed(bench.model, bench.family, index, sites, kept):
            fit(kept)
            return bench.divergence(index, measuring)

    def score_of(candidate: Attention) -> float:
        return measured(Block(candidate, FFN.whole(units)), lambda kept: repair_block(layer, kept))

    ranks = narrow_ranks(sites.attention.head_width, multiple)
    errors = attention_errors(_thinned(layer, LOCAL_TOKENS), paired_ranks(ranks))
    narrow = _by_errors({kept: score_of(kept) for kept in _measured(errors, sites.attention.head_width)}, errors)
    others = [(kept, score_of(kept)) for kept in (Attention("conv3"), Attention("conv1"), Attention("skip"))]
    second, moments = _into_second(layer)
    ranking = rank_units(moments.covariance, second.weight, ridge_for(moments))

    def fit_ffn(kept: Block) -> None:
        narrowed = bench.model.get_submodule(sites.ffn.second)
        assert isinstance(narrowed, nn.Linear)
        # Whole attention leaves the FFN the dense one's inputs, so all that its repair needs is in the moments.
        correct(narrowed, moments.left_out(kept.ffn.units, second.weight))

    widths = sorted({max(1, round(units * share)) for share in MEASURED_SHARES} - {units})
    points = [
        (width, measured(Block(Attention(), FFN(units, tuple(sorted(ranking.units[:width])))), fit_ffn))
        for width in widths
    ]
    attention = ((Attention(), 0.0), *_with_all_ranks(narrow, ranks), *others)
    return BlockScores(attention, ranking, _interpolated_widths(points, ranking.errors))


def _thinned(layer: Layer, tokens: int) -> Layer:
    """Return a dense layer with as many of its images, evenly from all, as have so many tokens."""
    step = max(1, sum(x.shape[:-1].numel() for x in layer.dense_inputs) // tokens)
    inputs = [x[::step] for x in layer.dense_inputs]
    known = {path: [out[::step] for out in outputs] for path, outputs in layer.known.items()}
    return replace(layer, inputs=inputs, dense_inputs=inputs, known=known)


def _measured(errors: Mapping[Attention, Missed], head_width: int) -> list[Attention]:
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


def _by_errors(measured: Mapping[Attention, float], errors: Mapping[Attention, Missed]) -> dict[Attention, float]:
    """Return scores of all narrower layers, from those of some and what each misses of the dense layer's output.

    What queries and keys miss and what values and heads miss add up, and each tells its own part of the divergence.
    """
    parts = []
    for name in ("logits", "outputs"):
        found = [getattr(errors[kept], name) for kept in errors]
        points = [(getattr(errors[kept], name), score) for kept, score in measured.items()]
        parts.append(_divergences(found, [(error, score) for error, score in points if error > 0]))
    return {**{kept: max(sum(own), FLOOR) for kept, *own in zip(errors, *parts)}, **measured}


def _into_second(layer: Layer) -> tuple[nn.Linear, Moments]:
    """Return the second linear layer of the dense block's FFN, and the moments of what it takes."""
    second = layer.host.get_submodule(layer.sites.ffn.second)
    assert isinstance(second, nn.Linear)
    moments = Moments()
    block = layer.host.get_submodule(layer.sites.path)
    for x in layer.dense_inputs:
        moments.add(reached(block, x, second, output=False))
    return second, moments


def _with_all_ranks(narrow: Mapping[Attention, float], ranks: Sequence[int]) -> list[tuple[Attention, float]]:
    """Return the candidates with those of equal ranks between, on lines through rank and log score."""
    known = {rank: math.log(narrow[kept]) for rank in ranks if (kept := Attention.narrow(rank)) in narrow}
    if not known:
        return list(narrow.items())
    between = [rank for rank in ranks if rank not in known]
    scores = [math.exp(_on_lines(rank, list(known), list(known.values()))) for rank in between]
    return [*zip(map(Attention.narrow, between), scores), *narrow.items()]


def _interpolated_widths(points: list[tuple[int, float]], errors: Sequence[float]) -> tuple[float, ...]:
    """Return scores by width, from some measured divergences and the error after repair, which is known for all."""
    if not points:
        # A single unit: there is nothing between keeping it and having no FFN, which no decision takes.
        return (*[math.inf] * (len(errors) - 1), 0.0)
    scores = _divergences(errors, [(errors[width], divergence) for width, divergence in points])
    scores[-1] = 0.0
    for width in reversed(range(len(scores) - 1)):
        # Nor is it as good to be narrower, so that what a budget leaves is spent on units.
        scores[width] = max(scores[width], scores[width + 1]) + FLOOR / len(scores)
    return tuple(scores)


def _divergences(errors: Sequence[float], measured: Sequence[tuple[float, float]]) -> list[float]:
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
    logarithms = [min(_on_lines(math.log(max(error, FLOOR)), xs, ys), LARGEST) for error in errors]
    return [math.exp(value) if error > 0 else 0.0 for value, error in zip(logarithms, errors)]


def _on_lines(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the value at x of the lines through points with ascending xs, the outer ones prolonged."""
    if len(xs) == 1:
        return ys[0] + x - xs[0]  # proportional, if these are logarithms
    upper = next((index for index, known in enumerate(xs) if known >= x), len(xs) - 1)
    upper = max(1, upper)
    lower = upper - 1
    share = (x - xs[lower]) / (xs[upper] - xs[lower])
    return ys[lower] + share * (ys[upper] - ys[lower])
