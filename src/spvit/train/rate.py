"""The learning rate of distillation without labels: the highest of a few that a short trial bears.

How high a rate a network bears differs a hundredfold between a large one trained on millions of images and a small one.
A trial gains where its end, or the weights half-way to it, agree better with the dense model than its start: of rates
that gain, the highest ends a longer training best, though not its first steps (docs/experiments/distillation.md). Where
ten times as many steps follow, a trial's end may also be somewhat worse than its start. Trials and training fall from
the rate to zero along a cosine: where minutes end the training, the trials say how many steps they have room for.
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

from torch.utils.data import Subset

from spvit.errors import RunError, RunStoppedError
from spvit.train.data import Images
from spvit.train.loop import Phase, Run, run_phase
from spvit.train.processes import by_the_first, processes, summed
from spvit.train.run_folder import RunFolder

RATES = (5e-6, 1.5e-5, 5e-5, 1.5e-4, 5e-4)
FIRST = 2
"""Place of the rate that is tried first."""
STEPS, VALIDATED = 40, 1000
"""Of a trial: how many steps it trains, and at most how many images judge it."""
LONG, BORNE = 10, 1.4
"""Where a training has so many times a trial's steps, a trial's end may be so many times as far from the dense model as
its start."""
TRAINING = 0.9
"""Share of the minutes that steps have; the rest is for evaluations."""
EVENT = "learning_rate"


def with_rate(phase: Phase, run: Run, started: float | None = None) -> Phase:
    """Return a phase with the learning rate that it is to have; a continued run keeps what it has found.

    started: when its minutes began, in seconds of `time.monotonic`; None: now. What was spent since then, trials
    included, is taken from its steps' time, but half of that at most.
    """
    started = time.monotonic() if started is None else started
    if phase.config.learning_rate is not None or run.reference is None:
        return phase
    found = run.folder.recorded(phase.name, EVENT)
    if not found:
        rate, speed = _best(phase, run, started)
        own = {"learning_rate": rate, "images_per_s": speed, "seconds": _spent(started)}
        found = {"phase": phase.name, "event": EVENT, "epoch": 0, **own}
        by_the_first(lambda: run.folder.record(found))
        run.progress.note(f"{phase.name}: learning rate {rate:.2g}, by short trials")
    steps = _steps(phase, run, found["images_per_s"], found["seconds"])
    settled = replace(phase.config, learning_rate=found["learning_rate"], minimum_learning_rate=0.0, reference_batch=0)
    return replace(phase, config=settled, steps=steps)


def _spent(started: float) -> float:
    """Return the seconds since then, the mean of all processes."""
    return round(summed(time.monotonic() - started)[0] / processes().num_processes, 3)


def _steps(phase: Phase, run: Run, speed: float, spent: float) -> int | None:
    """Return how many steps the minutes have room for, at so many images a second and less what was spent, if any."""
    if phase.config.minutes is None:
        return None
    seconds = TRAINING * 60 * phase.config.minutes
    seconds = max(seconds / 2, seconds - spent)
    return max(STEPS, int(seconds * speed / (_batch(run) * processes().num_processes)))


def _batch(run: Run) -> int:
    return run.images.config.batch_size * run.images.config.accumulate


def _best(phase: Phase, run: Run, started: float) -> tuple[float, float]:
    """Return the highest rate that its trial bears, or else the lowest, and how many images a second that took."""
    train: Any = run.images.train
    most = phase.config.epochs * (len(train) // (_batch(run) * processes().num_processes))
    with _trials(run.folder) as folder:

        def bears(rate: float) -> tuple[bool, float]:
            gains, further, speed = _trial(phase, run, rate, folder)
            steps = min(most, _steps(phase, run, speed, _spent(started)) or most)
            return gains or (steps >= LONG * STEPS and further <= BORNE), speed

        place = FIRST
        borne, speed = bears(RATES[place])
        while borne and place + 1 < len(RATES):
            higher, its_speed = bears(RATES[place + 1])
            if not higher:
                break
            place, speed = place + 1, its_speed
        while not borne and place > 0:
            place -= 1
            borne, speed = bears(RATES[place])
    return RATES[place], speed


@contextmanager
def _trials(folder: RunFolder) -> Iterator[RunFolder]:
    """Yield a folder inside a run's, which all processes see, and remove it; one that a killed run left goes first."""
    path = folder.path / ".trials"
    by_the_first(lambda: shutil.rmtree(path, ignore_errors=True))
    by_the_first(path.mkdir)
    yield RunFolder(path)
    by_the_first(lambda: shutil.rmtree(path))


def _some(images: Images) -> Any:
    """Return the first validation images, in whole batches, for which the dense model's answers are known."""
    validation: Any = images.validation
    batch = images.config.batch_size * processes().num_processes
    if len(validation) <= max(VALIDATED, batch):
        return validation
    return Subset(validation, range(max(1, VALIDATED // batch) * batch))


def _trial(phase: Phase, run: Run, rate: float, folder: RunFolder) -> tuple[bool, float, float]:
    """Return what some steps of a copy of the model do: whether they gain, and how many images a second they took.

    In between, of those that do not: how many times as far from the dense model as the start they end.
    """
    train: Any = run.images.train
    count = STEPS * _batch(run)
    few = Subset(train, list(islice(cycle(range(len(train))), count)))
    images = replace(run.images, train=few, validation=_some(run.images))
    plain: dict[str, Any] = {
        "minutes": None,
        "reference_batch": 0,
        "averaging_epochs": 0,
        "keep_best": True,
        "patience": 0,
    }
    # Adam's first steps go too far at a rate that later ones bear.
    short = replace(phase.config, epochs=1, learning_rate=rate, minimum_learning_rate=0.0, warmup_epochs=0.1, **plain)
    tried = replace(phase, name=f"trial of rate {rate:.2g}", model=copy.deepcopy(phase.model), config=short)
    try:
        run_phase(tried, replace(run, images=images, folder=folder))
    except RunStoppedError:
        raise
    except RunError:  # too high a rate overflows; whatever else fails here fails again where the phase is trained
        return False, math.inf, 0.0
    # The first process has written these.
    last, end = (folder.recorded(tried.name, event) for event in ("step", "evaluation"))
    best = folder.best(tried.name)[0]  # the start, where nothing gains
    missed = 1 - best["accuracy"]
    further = (1 - end["agreement"]) / missed if end and missed > 0 else math.inf
    gains, speed = summed(best["gained"] > 0, last["images_per_s"] if last else 0.0)
    return gains > 0, further, speed
