"""Trackers of experiments get the figures of metrics.jsonl, through Accelerate: TensorBoard, W&B, MLflow.

Each run folder is one run in each of them, called as the folder is; a continued run goes on with it.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker

from spvit.checkpoint import write_text
from spvit.errors import RunError, first_line
from spvit.train.run_folder import RunFolder
from spvit.train.settings import LoopConfig

PROJECT = "spvit"
# How each is opened: from the run folder, its run of before if any, and the step that it goes on from.
_OPEN: dict[str, Callable[[Path, str | None, int], Any]] = {
    "tensorboard": lambda folder, _, step: TensorBoardTracker("tensorboard", logging_dir=folder, purge_step=step),
    "wandb": lambda folder, run, _: WandBTracker(PROJECT, name=folder.name, id=run, resume="allow", dir=str(folder)),
    "mlflow": lambda folder, run, _: MLflowTracker(PROJECT, run_id=run, run_name=folder.name),
}
# What it calls its run, once it is open.
_RUN: dict[str, Callable[[Any], str]] = {
    "tensorboard": lambda tracker: tracker.name,
    "wandb": lambda tracker: tracker.tracker.id,
    "mlflow": lambda tracker: tracker.tracker.info.run_id,
}


class Tracking:
    """A phase's trackers: opened with the first figures, so that a phase that was over already opens none."""

    def __init__(self, config: LoopConfig, folder: RunFolder, phase: str) -> None:
        self.config, self.folder, self.phase = config, folder, phase
        self.trackers: list[GeneralTracker] = []
        self.before = 0

    def log(self, event: str, step: int, figures: Mapping[str, Any]) -> None:
        """Give figures of a step of the phase to all trackers, by names such as finetune/step/loss."""
        if self.config.trackers and not self.trackers:
            self.before = self.folder.steps_before(self.phase)
            self.trackers = self._open(self.before + step)
        numbers = {
            f"{self.phase}/{event}/{name}": value
            for name, value in _flat(figures)
            if isinstance(value, (int, float)) and name != "step"
        }
        for tracker in self.trackers:
            tracker.log(numbers, self.before + step)

    def _open(self, step: int) -> list[GeneralTracker]:
        """Return the trackers, at the run that the folder has in each or at a new one; what was of later steps goes."""
        path = self.folder.tracking
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        settings = {key: own if isinstance(own, (int, float)) else str(own) for key, own in _flat(asdict(self.config))}
        opened = []
        for name in self.config.trackers:
            try:
                tracker = _OPEN[name](self.folder.path.resolve(), known.get(name), step)
                getattr(tracker, "start", bool)()  # before Accelerate 1.8 making one starts it
                if name not in known:
                    tracker.store_init_configuration(settings)
                    known[name] = _RUN[name](tracker)
            except Exception as error:  # whatever its library raises: no server, no login, a run that is gone
                raise RunError(
                    f"track {name} failed ({first_line(error)}); mend it, and continue with --resume"
                ) from error
            opened.append(tracker)
        write_text(path, json.dumps(known) + "\n")
        return opened

    def close(self) -> None:
        """End the trackers' runs; another phase, or a continued run, takes them up again."""
        for tracker in self.trackers:
            tracker.finish()
        self.trackers = []


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield values by dotted names, those inside other mappings too."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
