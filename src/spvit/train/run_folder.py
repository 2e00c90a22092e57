"""One run, one folder: the names of its files and phases, and what may be done with it.

    config.yaml                         the settings, under a line that names their command
    metrics.jsonl                       figures every few steps and after every epoch
    scores.json, scores.safetensors     what scoring measured
    architecture.json                   what the run decided to keep
    state/PHASE/epoch-NNNN/             what a continued run starts from
    state/PHASE/best.json, .safetensors the best weights of a phase, where it keeps them
    dense/                              the dense model, where the run trained it
    model.json, model.safetensors       the result
    summary.json                        accuracy of the dense model, after pruning, and at the end

Every file is data: JSON, YAML or safetensors. Files are replaced as a whole, so a kill leaves the old or the new one.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from spvit.architecture import Architecture
from spvit.budget import TOLERANCE, human
from spvit.checkpoint import read_weights, write_text, write_weights
from spvit.cost import NetworkCost
from spvit.errors import BudgetError, DataError, RunError, RunFolderError, SpvitError
from spvit.repair.scores import Scores

DENSE, SEARCH, FINETUNE = "dense", "search", "finetune"

STATE_FORMAT = 2
"""Version of the states; those of the first were pickles, which are not read."""

FIXED = (
    *("model", "model_args", "pretrained", "checkpoint", "data", "macs", "params", "seed", "architecture", "scores"),
    *("initialise", "repair", "calibration_images", "multiple"),
)
"""Options that a continued run shares with the run that it continues, so that all files belong together."""


class RunFolder:
    """The folder of one run. Making one touches nothing; several processes may, and one of them writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.settings = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.architecture = self.path / "architecture.json"
        self.scores = self.path / "scores.json"
        self.dense = self.path / "dense"
        self.summary = self.path / "summary.json"

    @classmethod
    def open(cls, path: str | Path, resume: bool = False) -> RunFolder:
        """Return a folder that a run may write to. Raises RunFolderError: it is in use, or holds no run to continue."""
        run = cls(path)
        if run.path.exists() and not run.path.is_dir():
            raise RunFolderError(f"output {run.path} is a file; name a folder")
        if resume and not run.used:
            raise RunFolderError(f"output {run.path} holds no run to continue; leave out --resume to start one")
        if run.used and not resume:
            raise RunFolderError(f"output {run.path} is in use; name another folder, or continue its run with --resume")
        return run

    @property
    def used(self) -> bool:
        """Whether the folder holds anything."""
        return self.path.is_dir() and any(self.path.iterdir())

    @contextmanager
    def removed_if_refused(self) -> Iterator[None]:
        """Remove a new folder when its run is refused before it has written more than its settings and scores."""
        fresh, first = not self.used, (self.settings, self.scores, self.scores.with_suffix(".safetensors"))
        try:
            yield
        except SpvitError as error:
            produced = any(path.is_file() and path not in first for path in self.path.rglob("*"))
            if fresh and not produced and not isinstance(error, RunError):
                shutil.rmtree(self.path, ignore_errors=True)
            raise

    # Settings: what a continued run starts from, and what it must not change.

    def write_settings(self, command: str, text: str) -> None:
        """Write a command's settings, given as YAML; makes the folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.settings, f"{_heading(command)}\n{text}")

    def settings_of(self, command: str) -> Path:
        """Return config.yaml. Raises RunFolderError when there is none, or it is of another command."""
        if not self.settings.is_file():
            raise RunFolderError(f"output {self.path} holds no {self.settings.name}, so its run cannot be continued")
        first = self.settings.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
        if first != _heading(command):
            raise RunFolderError(f"output {self.path} holds a run of {first[2:]!r}, not of 'spvit {command}'")
        return self.settings

    def check_continued(self, before: Any, options: Any) -> None:
        """Raise RunFolderError when options differ from those of the run before where they must not."""
        for name in FIXED:
            if getattr(options, name, None) != getattr(before, name, None):
                raise RunFolderError(
                    f"output {self.path} holds a run with --{name} {getattr(before, name)}, not "
                    f"{getattr(options, name)}; continue it with its own, or name another folder"
                )
        own, other = (_way_to_decide(settings) for settings in (before, options))
        if own != other:
            raise RunFolderError(
                f"output {self.path} holds a run that decides by {own}, not by {other}; continue it with its own "
                "search.epochs, or name another folder"
            )
        tuned = self.has_begun(FINETUNE)
        decided = tuned or self.scores.exists() or self.architecture.exists() or self.has_begun(SEARCH)
        for phase, over in ((DENSE, decided), (SEARCH, tuned)):
            changed = _first_changed(getattr(before, phase, None), getattr(options, phase, None))
            if over and changed is not None:
                raise RunFolderError(
                    f"output {self.path} has gone on from its {phase} phase, which had {phase}.{changed}; continue it "
                    "with that, or name another folder"
                )

    # Metrics: one line of JSON each.

    def record(self, phase: str, values: Mapping[str, Any]) -> None:
        """Append a line of figures to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"phase": phase, **values}) + "\n")

    def rewind(self, phase: str, epoch: int) -> None:
        """Drop a phase's lines of later epochs, which a kill cut short; they are run again."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue  # a kill can cut the last line short
            if values["phase"] != phase or values["epoch"] <= epoch:
                kept.append(line)
        write_text(self.metrics, "".join(line + "\n" for line in kept))

    # States: one of each phase, the newest.

    def states(self, phase: str) -> Path:
        """Return the folder of a phase's states."""
        return self.path / "state" / phase

    def has_begun(self, phase: str) -> bool:
        """Return whether a phase has saved anything."""
        return any(self.states(phase).glob("*"))

    def newest_state(self, phase: str) -> Path | None:
        """Return the folder of the last saved state; None when no epoch was finished."""
        return max(self.states(phase).glob("epoch-*"), default=None)

    def save_state(self, phase: str, epoch: int, tensors: dict[str, Tensor], figures: Mapping[str, float]) -> None:
        """Write the state at the end of an epoch, with its evaluation; those before it go."""
        final = self.states(phase) / f"epoch-{epoch:04d}"
        partial = final.with_name(f".partial-{epoch:04d}")
        for old in (partial, final):
            shutil.rmtree(old, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(tensors, partial / "state.safetensors")
        write_text(partial / "state.json", json.dumps({"format": STATE_FORMAT, "figures": figures}))
        partial.rename(final)
        for old in self.states(phase).glob("epoch-*"):
            if old.name < final.name:
                shutil.rmtree(old)

    def read_state(self, phase: str) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
        """Return the epochs that a phase has done, its last saved state, and its figures; 0 and nothing if none.

        Raises:
            CheckpointError, RunFolderError: the state is damaged, or another version of spvit wrote it.
        """
        newest = self.newest_state(phase)
        if newest is None:
            return 0, {}, {}
        file = newest / "state.json"
        values = _read_json(file) if file.is_file() else {}
        if values.pop("format", None) != STATE_FORMAT:
            raise RunFolderError(
                f"output {self.path} holds a run of another version of spvit, whose state {newest} is not read; begin "
                "the run again in another folder"
            )
        return int(newest.name.removeprefix("epoch-")), read_weights(newest / "state.safetensors"), values["figures"]

    def offer_best(self, phase: str, epoch: int, accuracy: float, model: nn.Module) -> None:
        """Keep a model's weights if none had a higher accuracy: of equals the later ones, which trained longer."""
        best = self.best(phase)
        if best is not None and accuracy < best["accuracy"]:
            return
        self.states(phase).mkdir(parents=True, exist_ok=True)
        write_weights(model, self.states(phase) / "best.safetensors")
        write_text(self.states(phase) / "best.json", json.dumps({"epoch": epoch, "accuracy": accuracy}))

    def best(self, phase: str) -> dict[str, Any] | None:
        """Return the epoch and accuracy of a phase's best weights, or None."""
        path = self.states(phase) / "best.json"
        return _read_json(path) if path.is_file() else None

    def best_weights(self, phase: str) -> dict[str, Tensor]:
        """Return a phase's best weights. Raises CheckpointError when their file is missing or damaged."""
        return read_weights(self.states(phase) / "best.safetensors")

    # Results.

    def write_scores(self, scores: Scores) -> None:
        """Write what scoring measured, as a whole."""
        with tempfile.TemporaryDirectory(dir=self.path) as partial:
            scores.save(partial)
            for path in (self.scores.with_suffix(".safetensors"), self.scores):  # the second says that both are there
                (Path(partial) / path.name).replace(path)

    def write_architecture(self, architecture: Architecture) -> None:
        """Write architecture.json. Raises DataError when weights of another one were fine-tuned here already."""
        path = self.architecture
        if self.has_begun(FINETUNE) and path.is_file() and Architecture.load(path) != architecture:
            raise DataError(
                f"{self.path} has fine-tuned another architecture than what was found now; continue it with the "
                "settings that it was begun with, or name another folder"
            )
        write_text(path, architecture.to_json())

    def check_architecture(self, cost: NetworkCost, target: int) -> None:
        """Raise BudgetError when the architecture that the run has written is not of the budget that is asked for."""
        own = cost.of(Architecture.load(self.architecture))
        if abs(own - target) > TOLERANCE * target:
            raise BudgetError(
                f"{self.architecture} has {human(own)} {cost.metric} ({own / cost.dense:.1%}), not the {human(target)} "
                f"({target / cost.dense:.1%}) asked for; continue its run with its own budget, or name another folder"
            )

    def write_summary(self, figures: Mapping[str, Mapping[str, float]]) -> None:
        """Write the figures of a compression's models."""
        write_text(self.summary, json.dumps(figures, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise RunFolderError(f"{path} is damaged: expected an object, found {type(values).__name__}")
    return values


def _heading(command: str) -> str:
    return f"# spvit {command}"


def _way_to_decide(options: Any) -> str:
    """Return how a command decides what to keep, if it does."""
    searching = hasattr(options, SEARCH) and options.search.epochs > 0
    return "a search" if searching else "scores, without a search"


def _first_changed(before: Any, settings: Any) -> str | None:
    """Return the first setting of a phase that differs, with its former value."""
    for field in dataclasses.fields(before) if before != settings else ():
        if getattr(before, field.name) != getattr(settings, field.name):
            return f"{field.name} {getattr(before, field.name)}"
    return None
