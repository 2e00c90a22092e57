"""Fixed views of the training images with what the dense model answers to them, kept in memory.

Where distillation has few minutes on a processor, it sees a few images again and again, and the dense model's pass
takes more than half of a step at a quarter of the MACs (docs/experiments/distillation.md).

Shapes: V views [V, channels, height, width]; parts of answers [V, ..., D]; hidden states [V, tokens, D].
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from spvit.errors import DataError
from spvit.hosts.calling import in_mode
from spvit.hosts.host import Host
from spvit.speed.benchmark import Program
from spvit.train.data import Images, calibration, mixup_of, seed_of
from spvit.train.figures import Reference, autocast, figures_of
from spvit.train.hidden import hooked
from spvit.train.processes import processes
from spvit.train.settings import MOST_EPOCHS, LoopConfig, PhaseConfig

MOST, LEAST, BY_MINUTE = 4096, 1024, 800
"""Views by default: at most; at least, or memory has no room and all are drawn anew; and by each minute of a phase."""
KEPT_VIEWS = "kept_views"
"""Of the line of metrics.jsonl that says how many a phase keeps."""
FEW = 20
"""Minutes up to which a phase that they end keeps views by default: in more it would see them too often (a guess)."""
MEMORY = 2**32
"""Bytes that they take by default, at most."""
SEEN = 256
"""Views by which what a model has learnt of them is compared with what it does on held-out images."""
LEARNT = 0.05
"""What agreement on them may be above that on held-out images, or more images are asked for."""
FASTER = 0.75
"""Share of a pass's time in single precision that one in mixed precision may take: a step of training gains less."""

logger = logging.getLogger("spvit")


@dataclass(frozen=True)
class KeptViews(Dataset[Any]):
    """A data set of views, each with its number in place of a class, and what the dense model answers to them."""

    views: Tensor
    parts: Sequence[Tensor]
    hidden: Sequence[Tensor]
    """What arrives at each block but the first."""

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self.views[number], number

    def parts_of(self, numbers: Tensor) -> list[Tensor]:
        """Return the parts of the answers to views of numbers [B], on the device of these."""
        return _some(self.parts, numbers)

    def hidden_of(self, numbers: Tensor) -> list[Tensor]:
        """Return the hidden states of views of numbers [B], on the device of these."""
        return _some(self.hidden, numbers)


def _some(kept: Sequence[Tensor], numbers: Tensor) -> list[Tensor]:
    return [own[numbers.to(own.device)].to(numbers.device) for own in kept]


def most_views(name: str, settings: PhaseConfig, images: Images) -> int:
    """Return how many views a phase of a name is to keep at most; 0 where it draws all anew.

    Raises DataError when settings ask for some where none can be kept.
    """
    asked, why, step = settings.kept_views, None, images.config.batch_size * images.config.accumulate
    if images.classes:
        why = "the images have labels"
    elif mixup_of(images.config, 1, 0.0) is not None:
        why = "mixup and cutmix mix images anew"
    elif processes().num_processes > 1:
        why = "there are several processes"
    elif asked and asked < step:
        why = f"a step takes {step}"
    if asked and why is not None:
        raise DataError(f"{name}.kept_views is {asked}, but {why}; leave it out")
    if asked is not None or why is not None:
        return asked or 0
    minutes = settings.minutes if settings.epochs >= MOST_EPOCHS else None
    if minutes is None or minutes > FEW or processes().device.type != "cpu":
        return 0
    return max(step, min(MOST, int(BY_MINUTE * minutes)))


@torch.no_grad()
def fastest_precision(host: Host) -> str:
    """Return `bf16` where a pass of a host takes much less time in mixed precision on its device, else `fp32`."""
    program = Program.of("dense", host.model)
    images, milliseconds = program.images(8), dict.fromkeys(("fp32", "bf16"), math.inf)
    for _ in range(3):
        for precision, least in milliseconds.items():
            with autocast(images.device, precision):
                milliseconds[precision] = min(least, program.timed(images, 1))
    return "bf16" if milliseconds["bf16"] < FASTER * milliseconds["fp32"] else "fp32"


@torch.no_grad()
def keep_views(
    count: int,
    images: Images,
    reference: Reference,
    config: LoopConfig,
    hidden: bool = True,
    most_bytes: int | None = None,
    step: Callable[[], object] = lambda: None,
) -> KeptViews | None:
    """Return views drawn by the seed, with the reference's answers in half precision; None where memory has no room.

    Args:
        count: how many; fewer where images cannot be read, and are left out.
        hidden: whether hidden states are kept too.
        most_bytes: of views and answers; where these hold fewer views than `LEAST`, and than asked for, None is
            returned. None: whatever it takes.
        step: called after each batch.
    """
    arrived: list[Tensor] = []
    copied = partial(Tensor.to, dtype=torch.bfloat16, copy=True)
    handles = hooked(reference.host, lambda tokens: arrived.append(copied(tokens))) if hidden else []
    kept: list[Tensor] = []
    done, parts = 0, 0
    try:
        drawn = replace(images, views=images.train)
        for batch in calibration(drawn, seed_of(config.seed, "kept views"), count):
            arrived.clear()
            with in_mode(False, reference.host.model), autocast(processes().device, config.precision):
                found = reference.parts(batch.to(processes().device))
            parts = len(found)
            row = [batch, *(own.bfloat16().cpu() for own in (*found, *arrived))]
            if not kept:
                each = sum(own.nbytes for own in row) // len(batch)
                room = count if most_bytes is None else min(count, most_bytes // each)
                if room < min(count, LEAST):
                    return None
                kept = [own.new_empty(room, *own.shape[1:]) for own in row]
            taken = min(len(batch), len(kept[0]) - done)
            for own, new in zip(kept, row):
                own[done : done + taken] = new[:taken]
            done += taken
            step()
            if done == len(kept[0]):
                break
    finally:
        for handle in handles:
            handle.remove()
    views, *answers = (own[:done] for own in kept)
    return KeptViews(views, answers[:parts], answers[parts:])


def compare_with_kept(
    held_out: float, kept: KeptViews, model: nn.Module, images: Images, reference: Reference, config: LoopConfig
) -> float:
    """Return a model's agreement on the first views; log a warning where it is much above that on held-out images."""
    some = range(min(len(kept), SEEN))
    known = tuple(
        kept.parts_of(numbers.to(processes().device)) for numbers in torch.tensor(some).split(images.config.batch_size)
    )
    viewed = replace(images, validation=Subset(kept, some))
    [figures] = figures_of([model], viewed, config, replace(reference, known=known))
    seen = figures.quality
    if seen - held_out > LEARNT and 1 - held_out > 2 * (1 - seen):
        logger.warning(
            "the model agrees with the dense one to %.3f on views that it learnt from, and to %.3f on held-out images: "
            "more images would gain more than more minutes",
            *(seen, held_out),
        )
    return seen
