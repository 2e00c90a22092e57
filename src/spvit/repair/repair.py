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
from spvit.hosts.walk import BlockPair, Report, advance, calibration_batches, evaluating, first_inputs
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
) -> None:
    """Set the weights of models that were pruned to architectures, in place, so that they do what the host does.

    What pruning left whole keeps its weights, bit for bit, but for the second linear layer of FFNs behind the first
    change, which mend it. The host runs once for all models, and what it answers in a block is kept if there are
    several. A warning is logged where more images would help.

    Raises:
        CalibrationError: the images do not fit the host, are too few, or lead to activations that are not finite.
    """
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model, host.model))
        dense_inputs = first_inputs(host, calibration_batches(host, images))
        count = sum(BlockPair(host.model, host, 0, dense_inputs, dense_inputs).counts)
        streams = [dense_inputs for _ in models]  # until something is pruned both networks are one
        excess: list[list[float]] = [[] for _ in models]
        for index in range(len(host.blocks)):
            known: dict[str, list[Any]] | None = {} if len(models) > 1 else None
            for number, (model, architecture) in enumerate(zip(models, architectures)):
                kept = architecture.blocks[index]
                if streams[number] is dense_inputs and not changed(kept):
                    continue
                inputs = list(streams[number])
                pair = BlockPair(model, host, index, inputs, dense_inputs, known, excess=excess[number])
                repair_block(pair, kept, mend=True)
                if index + 1 < len(host.blocks):
                    advance(host.on(model), index, inputs)
                    streams[number] = inputs
            if index + 1 < len(host.blocks):
                advance(host, index, dense_inputs)
            if report is not None:
                report("repair", index + 1, len(host.blocks), {})
    worst = max((mean(own) for own in excess if own), default=0.0)
    if worst > EXCESS:
        logger.warning(
            "the repair misses %.0f %% more on held-out images than on those that it is fitted to: "
            "more than %d calibration images would help; 1,000 are advised",
            100 * worst,
            count,
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
        fit_ffn(pair)
