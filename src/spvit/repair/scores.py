"""What each candidate of each site costs in agreement with the dense network, measured on calibration images.

A candidate is installed alone in an otherwise dense network and repaired. What its layer misses on images that the
repair has not seen, along the gradient of the network's outputs there (`gradients`), is how far they diverge, to second
order. So some widths of an FFN and some narrower attention layers are measured; the scores of all others follow from
what they miss of their layer's output (`interpolation`), which is known for each.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_of
from torch import Tensor, nn

from spvit.architecture import DEFAULT_MULTIPLE, FFN, KINDS, Attention, Block
from spvit.budget import check_multiple
from spvit.errors import CalibrationError
from spvit.fields import fields_of, from_data, to_data
from spvit.hosts.host import Host
from spvit.hosts.walk import (
    BATCH,
    BlockPair,
    Finished,
    Part,
    Report,
    advance,
    calibration_batches,
    evaluating,
    first_inputs,
    reached,
)
from spvit.moments import Moments, ridge_for
from spvit.repair.errors import Ranking, attention_errors, paired_ranks, rank_units
from spvit.repair.gradients import gradients, metric
from spvit.repair.interpolation import FLOOR, by_errors, interpolated_widths, measured_choices, with_all_ranks
from spvit.repair.objective import Asked, Objective, name_of
from spvit.repair.repair import repair_block
from spvit.replacements.ffn import correct
from spvit.replacements.install import installed

MEASURED_SHARES = (1 / 8, 1 / 4, 1 / 2)
"""Shares of an FFN's units at which the divergence is measured."""
MEASURING = (96, 20_000)
"""Measure on at most 96 images, or on as many as hold 20,000 tokens of the first block if that is more: they pass
through most of the network for every candidate."""
FITTING = (256, 50_000)
"""The same for what the repair of candidates is fitted to; the repair at pruning takes all images."""
LOCAL_TOKENS = 12_000
"""Tokens, where there are so many, on which the errors of narrower layers are taken: each rank is a pass of them."""
FORMAT, VERSION = "spvit-scores", 1
DESCRIPTION, TENSORS = "scores.json", "scores.safetensors"


@dataclass(frozen=True)
class BlockScores:
    """How much the network's outputs diverge for what one block may become; 0 for keeping it whole."""

    attention: tuple[tuple[Attention, float], ...]
    """Candidates with their scores."""
    ranking: Ranking
    """The FFN's units, the most needed first."""
    ffn: tuple[float, ...]
    """Scores by how many units are kept, 0 to all."""

    def part(self) -> Part:
        """Return the scores as values for JSON and tensors, without loss."""
        numbers = {
            "attention": [score for _, score in self.attention],
            "errors": self.ranking.errors,
            "ffn": self.ffn,
        }
        tensors = {name: torch.tensor(own, dtype=torch.float64) for name, own in numbers.items()}
        tensors["units"] = torch.tensor(self.ranking.units)
        return {"attention": [to_data(attention) for attention, _ in self.attention]}, tensors

    @staticmethod
    def of_part(part: Part, where: str) -> BlockScores:
        """Return the scores that `part` returned; `where` is what errors name them by."""
        values, tensors = part
        own = {name: tensors[name].tolist() for name in ("attention", "errors", "ffn", "units")}
        attention = [from_data(Attention, item, f"{where} attention") for item in values["attention"]]
        pairs = tuple(zip(attention, own["attention"], strict=True))
        return BlockScores(pairs, Ranking(tuple(own["units"]), tuple(own["errors"])), tuple(own["ffn"]))


@dataclass(frozen=True)
class Scores:
    """What scoring measured of a host: any number of budgets follow from it."""

    blocks: tuple[BlockScores, ...]
    multiple: int
    """What the ranks of narrower attention are multiples of."""
    weights: str
    """Fingerprint of the host's weights."""
    objective: str
    """What counted of the outputs."""

    def check(self, host: Host) -> None:
        """Raise CalibrationError unless the scores are of this host."""
        sizes = [len(block.ffn) - 1 for block in self.blocks]
        if self.weights != host.fingerprint() or sizes != [block.ffn.units for block in host.blocks]:
            raise CalibrationError(
                f"the scores are of other weights than {host.name} has; score it again with spvit.score(host, images)"
            )

    def check_objective(self, asked: Asked) -> None:
        """Raise CalibrationError unless the scores are by an objective; `auto` is whatever they were made with."""
        if name_of(asked) not in ("auto", self.objective):
            found = f"the scores are by objective {self.objective}, not {name_of(asked)}"
            raise CalibrationError(f"{found}; leave the objective out, or score anew")

    def save(self, folder: str | Path) -> None:
        """Write the scores to a folder, as scores.json and scores.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        candidates = []
        for index, block in enumerate(self.blocks):
            values, own = block.part()
            candidates.append(values["attention"])
            tensors |= {f"{index}.{name}": tensor for name, tensor in own.items()}
        data = {"format": FORMAT, "version": VERSION, "multiple": self.multiple, "weights": self.weights}
        data["objective"] = self.objective
        (folder / TENSORS).write_bytes(safetensors_of(tensors))  # save_file lets nobody else read its files
        (folder / DESCRIPTION).write_text(json.dumps({**data, "attention": candidates}) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: str | Path) -> Scores:
        """Read the scores of a folder. Raises CalibrationError naming the folder when they are missing or damaged."""
        path = Path(folder) / DESCRIPTION
        try:
            data = fields_of(json.loads(path.read_text(encoding="utf-8")), FORMAT, VERSION)
            tensors = load_file(Path(folder) / TENSORS)
            blocks = []
            for index, candidates in enumerate(data["attention"]):
                own = {name: tensors[f"{index}.{name}"] for name in ("attention", "errors", "ffn", "units")}
                blocks.append(BlockScores.of_part(({"attention": candidates}, own), f"block {index}"))
            return Scores(tuple(blocks), int(data["multiple"]), str(data["weights"]), str(data["objective"]))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise CalibrationError(
                f"{folder} holds no scores that can be read ({reason}); make them with spvit.score(host, images)"
            ) from error


@dataclass(frozen=True)
class _Bench:
    """A copy of the dense network in which candidates take turns, and the gradients at the dense layers' outputs."""

    copy: Host
    gradients: dict[str, list[Tensor]]

    def measure(self, pair: BlockPair, path: str, kept: Block, fit: Callable[[], object]) -> float:
        """Return how far the outputs move by what a layer misses when its block keeps so much, fitted in the copy.

        pair: the dense block and the inputs to measure on.
        """
        site, moved = pair.sites.attention, 0.0
        with installed(self.copy, pair.index, kept) as grid:
            fit()
            answers = replace(pair, host=self.copy, known=None).wanted(path)
            for gradient, own, dense in zip(self.gradients[path], answers, pair.wanted(path)):
                if grid is not None and not site.prefix_tokens:  # it may get the map whole, the dense layer in windows
                    own = site.own_grid().scatter(grid.gather(own, 0))
                error = (own - dense).reshape(gradient.shape[1:])
                moved += float((gradient * error).sum(dim=2).double().square().sum())
        if not math.isfinite(moved):
            raise CalibrationError(
                f"the model's outputs are not finite with a candidate of block {pair.index}; check its weights"
            )
        return max(moved, FLOOR)


def score(
    host: nn.Module | Host,
    images: Tensor | Iterable[Any],
    *,
    multiple: int = DEFAULT_MULTIPLE,
    objective: Asked = "auto",
    report: Report | None = None,
    finished: Finished | None = None,
) -> Scores:
    """Return the scores of every block's candidates, once for any number of budgets.

    Args:
        host: the dense model.
        images: unlabelled images, normalised as in training, a few hundred or more: a tensor [images, channels, height,
            width], or batches. About 350 are used, or more of small ones; some fit the repairs, others measure.
        multiple: ranks of narrow attention are multiples of it.
        objective: what counts of the outputs: `logits`, by the divergence of their probabilities; or, by the squared
            error relative to the variance, `pooled` (the model's output), `tokens` (prefix and patch tokens behind the
            last norm), `features` (both), or a function of the model's output that returns a tensor [images, ...],
            through which gradients pass.
            `auto`: logits where the model tells two classes or more apart, features where it has no head.
        report: called after each block with ("score", blocks scored, blocks, {}).
        finished: gets each block's scores as they are found, and those of a call that was cut short are taken from it;
            a dictionary will do. The other arguments must be the same.

    Raises:
        BudgetError: the multiple is not 1 or more.
        CalibrationError: the images do not fit the host, are too few, or lead to values that are not finite; or the
            objective is unknown, does not fit the outputs, or has no gradient.
        UnsupportedHostError: the model's family, or a part of it, is not known.
    """
    check_multiple(multiple)
    name_of(objective)
    host, finished = Host.of(host), {} if finished is None else finished
    with evaluating(host.model):
        site = host.blocks[0].attention
        # Of a prefix token an image has but one, and its linear map has the host's width of inputs.
        least = site.dim // 2 if site.prefix_tokens else 0
        tokens = site.prefix_tokens + math.prod(site.grid)
        batches = split_images(list(calibration_batches(host, images)), tokens, least)
        fitting, measuring = (first_inputs(host, part) for part in batches)
        counted, twin = Objective.of(objective, host), host.on(copy.deepcopy(host.model))
        bench = _Bench(twin, gradients(host, counted, batches[1]))
        blocks = []
        for index in range(len(host.blocks)):
            part = finished.get(index)
            if part is None:
                pairs = [BlockPair(twin.model, host, index, inputs, inputs) for inputs in (fitting, measuring)]
                attention = _score_attention(bench, pairs[0], pairs[1], multiple)
                finished[index] = part = BlockScores(attention, *_score_ffn(bench, pairs[0], pairs[1])).part()
            blocks.append(BlockScores.of_part(part, f"block {index}"))
            if report is not None:
                report("score", index + 1, len(host.blocks), {})
            if index + 1 < len(host.blocks):
                for inputs in (fitting, measuring):
                    advance(host, index, inputs)
    return Scores(tuple(blocks), multiple, host.fingerprint(), counted.name)


def split_images(batches: list[Tensor], tokens: int, least: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Return batches of the images to fit and of those to measure, each taken evenly from all: every other one of few.

    tokens: of one image; least: images to fit, if there are so many. Raises CalibrationError for a single image.
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


def _score_attention(
    bench: _Bench, fitting: BlockPair, measuring: BlockPair, multiple: int
) -> tuple[tuple[Attention, float], ...]:
    site, units = fitting.sites.attention, fitting.sites.ffn.units
    fitting, measuring = fitting.knowing(site.path), measuring.knowing(site.path)

    def score_of(candidate: Attention) -> float:
        kept = Block(candidate, FFN.whole(units))
        return bench.measure(measuring, site.path, kept, lambda: repair_block(fitting, kept))

    step = multiple if site.rotary is None else math.lcm(multiple, 2)  # dimensions that rotate go in pairs
    ranks = range(step, site.head_width, step)
    noticed = metric(bench.gradients[site.path], site.dim)
    errors = attention_errors(fitting.thinned(LOCAL_TOKENS), paired_ranks(ranks), noticed)
    choices = list(errors)
    measured = {choices.index(kept): score_of(kept) for kept in measured_choices(errors)}
    narrow = dict(zip(choices, by_errors(list(errors.values()), measured)))
    others = [kept for kept in map(Attention, KINDS) if kept != Attention()]
    return ((Attention(), 0.0), *with_all_ranks(narrow, ranks), *((kept, score_of(kept)) for kept in others))


def _score_ffn(bench: _Bench, fitting: BlockPair, measuring: BlockPair) -> tuple[Ranking, tuple[float, ...]]:
    path, units = fitting.sites.ffn.second, fitting.sites.ffn.units
    linear, moments = _into_second(fitting)
    noticed = metric(bench.gradients[path], fitting.sites.attention.dim)
    ranking = rank_units(moments.covariance, noticed @ linear.weight.double(), ridge_for(moments))
    measuring = measuring.knowing(path)

    def score_of(width: int) -> float:
        kept = FFN(units, tuple(sorted(ranking.units[:width])))

        def fit() -> None:
            narrowed = bench.copy.model.get_submodule(path)
            assert isinstance(narrowed, nn.Linear)
            # Whole attention leaves the FFN the dense one's inputs, so all that its repair needs is in the moments.
            correct(narrowed, moments.left_out(kept.units, linear.weight))

        return bench.measure(measuring, path, Block(Attention(), kept), fit)

    widths = sorted({max(1, round(units * share)) for share in MEASURED_SHARES} - {units})
    return ranking, interpolated_widths({width: score_of(width) for width in widths}, ranking.errors)


def _into_second(pair: BlockPair) -> tuple[nn.Linear, Moments]:
    """Return the second linear layer of the dense block's FFN, and the moments of what it takes."""
    second = pair.host.model.get_submodule(pair.sites.ffn.second)
    assert isinstance(second, nn.Linear)
    moments = Moments()
    for x in pair.dense_inputs:
        moments.add(reached(pair.dense_block, x, second, output=False))
    return second, moments
