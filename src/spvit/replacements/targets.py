"""What a changed layer is fitted to: what it would answer unpruned, and what holds of what brings the stream back.

By the time that images reach a block, the pruned network's residual stream s differs from the dense one, s*. Three
outputs could be wanted of a layer f of that block, whose output is added to the stream times a scale g (LayerScale, or
one):

    layer   f(s*)                   the dense network's own output there: what came before is carried on for ever
    own     f(s)                    what the unpruned layer would answer to what it now gets
    stream  f(s*) + (s* - s) / g    what would bring the stream back to the dense one

`own` is exact where the layer can be, but lets errors stand; `stream` mends them, and overfits when images are few or
alike. So the target is `own`, and of what it misses of `stream` the part that the layer's inputs predict. That is a
ridge regression of its own, whose ridge follows from inputs by image, and a share of it: the one that is best where
each half of the images is predicted from the other (docs/experiments/repair_target.md).

Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spvit.hosts.calling import answering, answers_changed, batch_first, inside, reached
from spvit.hosts.units import narrow_ffn
from spvit.hosts.walk import BlockPair, keeping
from spvit.moments import Moments, regression

RIDGE = 0.04
"""Ridge for what is missing, times inputs by image: few images say little of how that follows from directions in which
inputs hardly vary."""
SMALLEST = 1e-4
"""Scales are not divided by below this share of the mean squared scale: such outputs hardly reach the stream."""

Target = tuple[Tensor, Tensor | None]
"""`own`, and what it misses of `stream`: [B, N, D] each; None where that is nothing, or nothing can be done."""


class Gathered:
    """Moments of what arrives at a layer and of its target, of the first and of the second half of the images."""

    def __init__(self, pair: BlockPair) -> None:
        self._left, self._images = list(pair.counts), sum(pair.counts)
        self._first = (self._images + 1) // 2
        self._halves: list[Moments] = []
        self._squares: Tensor | None = None
        self._excess = pair.excess

    def add(self, x: Tensor, own: Tensor, missing: Tensor | None, prefix: int = 0) -> None:
        """Take in the next batch: inputs x [B, N, X], maybe windows, and a target; prefix as in `Moments.add`."""
        if missing is not None:
            squares = missing.flatten(0, -2).square().sum(0, dtype=torch.float64)
            self._squares = squares if self._squares is None else self._squares + squares
            own = torch.cat([own, missing], dim=-1)
        images = self._left.pop(0)
        cut = min(images, self._first) * (len(x) // images)
        self._first -= min(images, self._first)
        for half, some in enumerate((slice(cut), slice(cut, None))):
            if not len(x[some]):
                continue
            if half == len(self._halves):
                self._halves.append(Moments(*self._halves[:1]))
            self._halves[half].add(x[some], own[some], prefix)

    def moments(self, biased: bool) -> Moments:
        """Return the moments of inputs and targets: own, and what the inputs predict of what is missing.

        biased: whether the layer has a bias.
        """
        both = functools.reduce(operator.add, self._halves)
        if self._squares is None:
            return both
        width = len(self._squares)
        covariance, cross = both.products(biased)
        weight = self._share(biased) * regression(covariance, cross[:, width:], self._ridge(both))
        constant = both.mean_y[width:] - both.mean_x @ weight if biased else weight.new_zeros(width)
        return both.plus(weight, constant)

    def _ridge(self, moments: Moments) -> float:
        return RIDGE * moments.inputs / self._images

    def _share(self, biased: bool) -> float:
        """Return how much of what is predicted of the missing part to take: what is best on held-out images.

        Each half is predicted from the other one. The best share is signal / (signal + noise) there, and all images
        have half the noise of half of them: from a share s of halves follows 2 s / (1 + s).
        """
        if len(self._halves) < 2 or self._squares is None:
            return 0.0
        # Outputs count by what they miss relative to their own size, whatever the scales are that they go through.
        weight = 1 / self._squares.clamp(min=1e-30)
        # Products of what is predicted with what is missing, and with itself; on fitted and on held-out images.
        alike, power = torch.zeros(2, 2, dtype=torch.float64)
        for fitted, held in (self._halves, self._halves[::-1]):
            covariance, cross = fitted.products(biased)
            predicts = regression(covariance, cross[:, len(weight) :], self._ridge(fitted))
            for number, half in enumerate((fitted, held)):
                if half is held:
                    covariance, cross = held.products(biased, about=fitted)
                scaled = half.count * weight * predicts
                alike[number] += float((scaled * cross[:, len(weight) :]).sum())
                power[number] += float((scaled * (covariance @ predicts)).sum())
        at_fit, held_out = (len(weight) - 2 * alike + power).tolist()
        self._excess.append(held_out / at_fit - 1 if at_fit > 0 else 0.0)
        share = min(1.0, max(0.0, float(alike[1] / power[1]))) if power[1] > 0 else 0.0
        return 2 * share / (1 + share)


def attention_targets(pair: BlockPair) -> Iterator[Target]:
    """Yield what the attention layer of the pruned block is to answer, a batch each.

    Where both networks are one before it, it is the dense layer's output, and nothing is missing.
    """
    site = pair.sites.attention
    if all(own is dense for own, dense in zip(pair.inputs, pair.dense_inputs)):
        yield from ((answer, None) for answer in pair.wanted(site.path))
        return
    scale = _scale(pair, site.path)
    layer = pair.host.model.get_submodule(site.path)
    for x, dense_x, answer in zip(pair.inputs, pair.dense_inputs, pair.wanted(site.path)):
        own, missing = batch_first(site, reached(pair.dense_block, x, layer, output=True)), None
        if scale is not None:
            missing = batch_first(site, dense_x - x) * scale
            if site.layout is not None:  # a map [B, height, width, D] or its tokens, which attention gets in windows
                missing = site.own_grid().scatter(missing.flatten(1, -2))
            missing = missing + answer - own
        yield own, missing


def ffn_targets(pair: BlockPair, kept: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield what arrives at the second linear layer of the pruned block's FFN, [B, N, X], and its target, a batch each.

    In place of `own` it is what the layer's answer lacks of that: what the units add that are not kept.
    """
    attention, scale = pair.sites.attention, _scale(pair, pair.sites.ffn.second)
    second, narrow = (model.get_submodule(pair.sites.ffn.second) for model in (pair.host.model, pair.model))
    order = [*kept, *sorted(set(range(pair.sites.ffn.units)) - set(kept))]
    # All units of the dense layers, with those first that are kept.
    ordered = narrow_ffn(pair.host.model, pair.sites.ffn, torch.tensor(order))
    outward: Any = ordered.pop(pair.sites.ffn.second)
    removed = outward.weight[:, len(kept) :]
    norm, answers = pair.sites.ffn.norm, [] if pair.attention is None else pair.attention
    mixed = norm is not None and not isinstance(pair.model.get_submodule(norm), nn.Conv2d)

    def beside(x: Tensor) -> tuple[Tensor, Tensor]:
        with _answering({second: x.new_zeros(())}) as answers:
            return pair.dense_block(x), answers[second]

    aims: Iterator[Any] = itertools.repeat((None, None)) if scale is None else pair.of_dense("beside", beside)
    for number, (x, (aim, answer)) in enumerate(zip(pair.inputs, aims)):
        with keeping(inside(pair.model.get_submodule(attention.path)), answers, number):
            rest, whole = _without_second(pair, x, ordered)
            units = _without_second(pair, x, {})[1] if mixed else whole[..., : len(kept)]
        given, missing = narrow(units), None
        lacking = outward(whole) - given if mixed else F.linear(whole[..., len(kept) :], removed)
        if scale is not None:
            missing = torch.zeros_like(given)
            if not torch.equal(aim, rest):  # or only rounding would be missing
                missing = (aim - rest).reshape(given.shape) * scale + answer - (given + lacking)
            missing = batch_first(attention, missing)
        yield batch_first(attention, units), batch_first(attention, lacking), missing


def _without_second(pair: BlockPair, x: Tensor, others: Mapping[str, nn.Module]) -> tuple[Tensor, Tensor]:
    """Return what the pruned block answers when its FFN's second layer answers zeros, and what arrives at that.

    others: by path, what runs in place of some of its layers.
    """
    found: list[Tensor] = []

    def zeros(units: Tensor) -> Tensor:
        found.append(units)
        return units.new_zeros(*units.shape[:-1], pair.sites.attention.dim)

    with ExitStack() as stack:
        stack.enter_context(answering(pair.model.get_submodule(pair.sites.ffn.second), zeros))
        for path, module in others.items():
            stack.enter_context(answering(pair.model.get_submodule(path), module.forward))
        return pair.block(x), found[0]


def _scale(pair: BlockPair, path: str) -> Tensor | None:
    """Return one over the scale g at which a layer's output reaches the block's, [D]; None where none is found."""
    if path not in pair.host.scales:
        pair.host.scales[path] = _measured_scale(pair, path)
    return pair.host.scales[path]


def _measured_scale(pair: BlockPair, path: str) -> Tensor | None:
    """Return it from a run of the dense block.

    Measured on a stream of zeros, beside which nothing is rounded off: the layer answers 0, v and 2 v, and the block's
    other layer 0. Then the block's output is to change by g v and 2 g v; behind a norm, say, it does not.
    """
    paths = (path, pair.sites.attention.path, pair.sites.ffn.second)
    layer, attention, second = (pair.host.model.get_submodule(name) for name in paths)
    x = torch.zeros_like(pair.images(pair.dense_inputs[0], slice(1)))
    probe = torch.linspace(1, 2, pair.sites.attention.dim, dtype=x.dtype, device=x.device)
    outputs = []
    for factor in (0, 1, 2):
        with _answering({attention: 0 * probe, second: 0 * probe, layer: factor * probe}):
            outputs.append(pair.dense_block(x).flatten(0, -2))
    changes = torch.stack([outputs[1] - outputs[0], (outputs[2] - outputs[0]) / 2])
    scale = changes[0, 0] / probe
    tolerance = max(1e-3, 4 * torch.finfo(x.dtype).eps)
    if not scale.any() or not torch.allclose(changes, (scale * probe).expand_as(changes), rtol=tolerance, atol=0):
        return None
    return scale / (scale.square() + SMALLEST * scale.square().mean())


@contextmanager
def _answering(others: dict[nn.Module, Tensor]) -> Iterator[dict[nn.Module, Tensor]]:
    """Have modules answer other tensors inside the context, [B, N, D] or one vector [D]; yield their own answers."""
    answers: dict[nn.Module, Tensor] = {}

    def answer(module: nn.Module, own: Tensor) -> Tensor:
        answers[module] = own
        return others[module].expand_as(own).clone()  # some blocks add to it in place

    with answers_changed({module: functools.partial(answer, module) for module in others}):
        yield answers
