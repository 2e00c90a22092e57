"""Every changed layer is one regression: what pruning removed is predicted from what stays, from unlabelled images.

Each layer that pruning changed is solved as a least-squares problem: its inputs are those of the network pruned so far,
its target (replacements/targets.py) also mends what the layers before it changed. Images pass block by block; second
moments are summed up as they do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from statistics import mean
from typing import Any

from torch import Tensor, nn

from spvit.architecture import Architecture, Block
from spvit.hosts.calling import inside
from spvit.hosts.host import Host
from spvit.hosts.walk import BlockPair, Finished, Report, advance, calibration_batches, evaluating, first_inputs
from spvit.replacements import replacement
from spvit.replacements.ffn import fit_ffn

EXCESS = 0.5
"""Share by which errors on held-out images are larger, on average, above which more images are asked for."""

logger = logging.getLogger("spvit")


def repair(
    models: Sequence[nn.Module],
    host: Host,
    architectures: Sequence[Architecture],
    images: Tensor | Iterable[Any],
    report: Report | None = None,
    finished: Sequence[Finished] | None = None,
) -> None:
    """Set the weights of models that were pruned to architectures, in place, so that they do what the host does.

    What pruning left whole keeps its weights, bit for bit, but for the second linear layer of FFNs behind the first
    change, which mend it. The host runs once for all models, and what it answers in a block is kept if there are
    several. A warning is logged where more images would help. Blocks that are finished, by a call with the same
    arguments that was cut short, are taken as they are, for each model; where all are, no image is read.

    Raises:
        CalibrationError: the images do not fit the host, are too few, or lead to activations that are not finite.
    """
    places = range(len(host.blocks))
    # Until something is pruned both networks are one.
    firsts = [next((at for at in places if changed(own.blocks[at])), len(places)) for own in architectures]
    nothing: Finished = {}
    parts = [
        {at: own.get(at) for at in places[first:]} for first, own in zip(firsts, finished or [nothing] * len(models))
    ]
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model, host.model))
        reads = any(None in own.values() for own in parts)
        dense_inputs = first_inputs(host, calibration_batches(host, images)) if reads else []
        count = sum(BlockPair(host.model, host, 0, dense_inputs, dense_inputs).counts)
        streams = [dense_inputs for _ in models]
        excess: list[list[float]] = [[] for _ in models]
        for index in places:
            known: dict[str, list[Any]] | None = {} if len(models) > 1 else None
            for number in (number for number, first in enumerate(firsts) if index >= first):
                model, before, part = models[number], len(excess[number]), parts[number][index]
                inputs, block = list(streams[number]), model.get_submodule(host.blocks[index].path)
                attention: list[Any] = []
                if part is None:
                    pair = BlockPair(model, host, index, inputs, dense_inputs, known, 0, excess[number], attention)
                    repair_block(pair, architectures[number].blocks[index], mend=True)
                    if finished is not None:
                        state = {name: value.cpu().contiguous().clone() for name, value in block.state_dict().items()}
                        finished[number][index] = {"excess": excess[number][before:]}, state
                else:
                    block.load_state_dict(part[1])
                    excess[number] += part[0]["excess"]
                if index + 1 < len(places):
                    advance(host.on(model), index, inputs, attention)
                    streams[number] = inputs
            if index + 1 < len(places):
                advance(host, index, dense_inputs)
            if report is not None:
                report("repair", index + 1, len(places), {})
    worst = max((mean(own) for own in excess if own), default=0.0)
    if reads and worst > EXCESS:
        logger.warning(
            "the repair misses %.0f %% more on held-out images than on those that it is fitted to: "
            "the %s views that it had are too few or too alike, so more images would help",
            100 * worst,
            f"{count:,}",
        )


def changed(kept: Block) -> bool:
    """Return whether pruning changes a block."""
    return kept.attention.kind != "msa" or kept.attention.narrowed() or len(kept.ffn.units) < kept.ffn.width


def repair_block(pair: BlockPair, kept: Block, mend: bool = False) -> None:
    """Repair one block in place: its attention, then its FFN behind the repaired attention.

    mend: whether a whole FFN, too, mends what changed before it.
    """
    attention = kept.attention
    if kept.tokens == "prefix":
        pair = replace(pair, prefix=pair.sites.attention.prefix_tokens)
    if attention.kind != "msa" or attention.narrowed():
        replaced = inside(pair.model.get_submodule(pair.sites.attention.path))
        replacement(attention.kind).fit(replaced, pair, attention)
    if mend or len(kept.ffn.units) < kept.ffn.width:
        fit_ffn(pair, kept.ffn.units)
