"""What a changed layer is fitted to: what it would answer unpruned, and what brings the residual stream back.

By the time that images reach a block, the pruned network's residual stream s differs from the dense one, s*. Three
outputs could be wanted of a layer f of that block, whose output is added to the stream times a scale g (LayerScale, or
one):

    layer   f(s*)                   the dense network's own output there: what came before is carried on for ever
    own     f(s)                    what the unpruned layer would answer to what it now gets
    stream  f(s*) + (s* - s) / g    what would bring the stream back to the dense one

`own` is exact where the layer can be, but lets errors stand; `stream` mends them, and overfits when images are few or
alike. Half of each is best or nearly so, whatever the budget and the images (docs/experiments/repair_target.md).

Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spvit.hosts.calling import batch_first
from spvit.hosts.walk import BlockPair, reached, tokens_of

STREAM = 0.5
"""Share of `stream` in what is wanted; the rest is `own`."""
SMALLEST = 1e-4
"""Scales are not divided by below this share of the mean squared scale: such outputs hardly reach the stream."""


def targets(pair: BlockPair, path: str) -> Iterator[Tensor]:
    """Yield what a layer of the pruned block is to answer, [B, N, D] a batch: an attention layer, or an FFN's second.

    For an attention layer behind which both networks are one, all targets are the dense layer's output.
    """
    if path == pair.sites.ffn.second:
        return _ffn(pair)
    same = all(own is dense for own, dense in zip(pair.inputs, pair.dense_inputs))
    return pair.wanted(path) if same else _attention(pair)


def _attention(pair: BlockPair) -> Iterator[Tensor]:
    site, scale = pair.sites.attention, _scale(pair, pair.sites.attention.path)
    layer = pair.host.model.get_submodule(site.path)
    for x, dense_x, answer in zip(pair.inputs, pair.dense_inputs, pair.wanted(site.path)):
        own = batch_first(site, reached(pair.dense_block, x, layer, output=True))
        if scale is not None:
            missing = batch_first(site, dense_x - x) * scale
            if site.layout is not None:  # a map [B, height, width, D] or its tokens, which attention gets in windows
                missing = site.own_grid().scatter(missing.flatten(1, -2))
            own = own + STREAM * (answer - own + missing)
        yield own


def _ffn(pair: BlockPair) -> Iterator[Tensor]:
    site, scale = pair.sites.ffn, _scale(pair, pair.sites.ffn.second)
    dense, pruned = pair.dense_block, pair.block
    firsts = [pair.host.model.get_submodule(path) for path in site.linears]
    arriving, corrected = (pair.model.get_submodule(path) for path in (site.linears[0], site.second))
    second = pair.host.model.get_submodule(site.second)
    for x, dense_x in zip(pair.inputs, pair.dense_inputs):
        hidden = reached(pruned, x, arriving, output=False)
        with ExitStack() as stack:
            for first in firsts:
                hook = first.register_forward_pre_hook(lambda module, args, given=hidden: (given,))
                stack.callback(hook.remove)
            own = reached(dense, x, second, output=True)
        if scale is not None:
            nothing = torch.zeros_like(own)
            with _answering({second: nothing, corrected: nothing}) as answers:
                missing = (dense(dense_x) - pruned(x)).reshape(own.shape) * scale
            own = own + STREAM * (answers[second] - own + missing)
        yield batch_first(pair.sites.attention, own)


def _scale(pair: BlockPair, path: str) -> Tensor | None:
    """Return one over the scale g at which a layer's output reaches the block's output, [D]; None where none is found.

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

    def answer(module: nn.Module, args: Any, output: Any) -> Any:
        answers[module] = tokens_of(output)
        other = others[module].expand_as(answers[module]).clone()  # some blocks add to it in place
        return (other, *output[1:]) if isinstance(output, tuple) else other

    with ExitStack() as stack:
        for module in others:
            stack.callback(module.register_forward_hook(answer).remove)
        yield answers
