"""The learning rate of distillation without labels: the last of a few rising ones that a short trial gains by.

How high a rate a network bears differs a hundredfold between a large one trained on millions of images and a small one.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

from torch.utils.data import Subset

from spvit.train.loop import Phase, Run, run_phase
from spvit.train.processes import by_the_first
from spvit.train.run_folder import RunFolder

RATES = (5e-6, 1.5e-5, 5e-5, 1.5e-4, 5e-4)
STEPS, VALIDATED = 40, 1000
"""Of a trial: how many steps it trains, and at most how many images judge it."""
EVENT = "learning_rate"


def with_rate(phase: Phase, run: Run) -> Phase:
    """Return a phase with the learning rate that it is to have; a continued run keeps what it has found."""
    if phase.config.learning_rate is not None or run.reference is None:
        return phase
    found = run.folder.recorded(phase.name, EVENT)
    rate = found["learning_rate"] if found else _best(phase, run)
    if not found:
        line = {"phase": phase.name, "event": EVENT, "epoch": 0, "learning_rate": rate}
        by_the_first(lambda: run.folder.record(line))
        run.progress.note(f"{phase.name}: learning rate {rate:.2g}, by short trials")
    return replace(phase, config=replace(phase.config, learning_rate=rate, reference_batch=0))


def _best(phase: Phase, run: Run) -> float:
    """Return the rate after which the next one brings a model less near to the dense one."""
    found: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for rate in RATES:
            found.append(_trial(phase, run, rate, RunFolder(folder)))
            if len(found) > 1 and found[-1] <= found[-2]:
                return RATES[len(found) - 2]
    return RATES[-1]


def _trial(phase: Phase, run: Run, rate: float, folder: RunFolder) -> float:
    """Return the quality of a copy of the model after some steps at a constant rate."""
    train: Any = run.images.train
    validation: Any = run.images.validation
    count = STEPS * run.images.config.batch_size * run.images.config.accumulate
    images = replace(
        run.images,
        train=Subset(train, list(islice(cycle(range(len(train))), count))),
        validation=Subset(validation, range(min(VALIDATED, len(validation)))),
    )
    plain: dict[str, Any] = {
        "minutes": None,
        "reference_batch": 0,
        "averaging_epochs": 0,
        "keep_best": False,
        "patience": 0,
    }
    short = replace(phase.config, epochs=1, learning_rate=rate, **plain)
    name = f"rate {rate:.2g}"
    tried = replace(phase, name=name, model=copy.deepcopy(phase.model), config=replace(short, warmup_epochs=0))
    return run_phase(tried, replace(run, images=images, folder=folder)).quality
