"""Every changed layer is one regression: what pruning removed is predicted from what stays, from unlabelled images.

Each layer that pruning changed is solved as a least-squares problem: its inputs are those of the network pruned so far,
its target (replacements/targets.py) also mends what the layers before it changed. Images pass block by block; second
moments are summed up as they do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
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
    model: nn.Module,
    host: Host,
    architecture: Architecture,
    images: Tensor | Iterable[Any],
    report: Report | None = None,
    finished: Finished | None = None,
) -> None:
    """Set the weights of a model that was pruned to an architecture, in place, so that it does what the host does.

    What pruning left whole keeps its weights, bit for bit, but for the second linear layer of FFNs behind the first
    change, which mend it. A warning is logged where more images would help. Blocks that are finished, by a call with
    the same arguments that was cut short, are taken as they are; where all are, no image is read.

    Raises:
        CalibrationError: the images do not fit the host, are too few, or lead to activations that are not finite.
    """
    pruned, finished = host.on(model), {} if finished is None else finished
    parts = [finished.get(index) for index in range(len(host.blocks))]
    with evaluating(model, host.model):
        dense_inputs = first_inputs(host, calibration_batches(host, images)) if None in parts else []
        inputs, untouched = list(dense_inputs), True
        excess: list[float] = []
        for index, kept in enumerate(architecture.blocks):
            untouched = untouched and not changed(kept)
            pair, before = BlockPair(model, host, index, inputs, dense_inputs, excess=excess), len(excess)
            block, part = model.get_submodule(host.blocks[index].path), parts[index]
            if part is None:
                repair_block(pair, kept, mend=not untouched)
                state = {} if untouched else block.state_dict()
                tensors = {name: value.cpu().contiguous().clone() for name, value in state.items()}
                finished[index] = {"excess": excess[before:]}, tensors
            elif not untouched:
                block.load_state_dict(part[1])
                excess += part[0]["excess"]
            if report is not None:
                report("repair", index + 1, len(host.blocks), {})
            if index + 1 == len(host.blocks):
                break
            if not untouched:  # until something is pruned both networks are one
                advance(pruned, index, inputs)
            advance(host, index, dense_inputs)
            if untouched:
                inputs = list(dense_inputs)
    if dense_inputs and excess and mean(excess) > EXCESS:
        logger.warning(
            "the repair misses %.0f %% more on held-out images than on those that it is fitted to: "
            "more than %d calibration images would help; 1,000 are advised",
            100 * mean(excess),
            sum(pair.counts),
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
