"""One run, one folder: the names of its files and phases, and what may be done with it.

    config.yaml                         the settings, under a line that names their command
    metrics.jsonl                       figures every few steps and after every epoch
    tracking.json                       which runs of trackers get the same figures
    scores.json, scores.safetensors     what scoring measured
    latency_table.json                  what latency was measured for a latency budget
    architecture.json                   what the run decided to keep
    state/config.yaml                   the settings as the run last used them, which edits are compared with
    state/images/headers.safetensors    which image files were looked at, and which of them cannot be read
    unreadable.json                     images that the run left out, and why
    state/PHASE/epoch-NNNN[-STEP].safetensors   the last two states: so many epochs done, and steps of the next
    state/PHASE/best.safetensors        the best weights of a phase, where it keeps them
    state/score/block-NNNN.safetensors  the scores of a block, until all are there
    state/repair/block-NNNN.safetensors  the repaired weights of a block
    dense/                              the dense model, where the run trained it
    model.json, model.safetensors       the result
    summary.json                        accuracy and costs of the dense model, after pruning, and at the end
    latency.json                        latency of the dense and the pruned model, measured side by side
    report.html                         a page about all of this

Every file is data: JSON, YAML or safetensors. Files are replaced as a whole, so a kill leaves the old or the new one.
While a run writes here, `.lock` says which process does.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from spvit.architecture import Architecture
from spvit.checkpoint import UNFINISHED, make_folder, replace_atomically, write_text
from spvit.errors import CheckpointError, RunError, RunFolderError, RunStoppedError, SpvitError
from spvit.repair.scores import Scores
from spvit.train.lock import locked
from spvit.train.states import about_state, read_state, write_state

DENSE, SEARCH, FINETUNE = "dense", "search", "finetune"
SCORE, REPAIR = "score", "repair"  # which have blocks in place of epochs

KEPT_STATES = 2
# Options that a continued run shares with the run that it continues, so that all files belong together.
FIXED = (
    *("model", "model_args", "pretrained", "checkpoint", "data", "macs", "params", "seed", "architecture", "scores"),
    *("initialise", "repair", "calibration_images", "repair_views", "multiple", "objective"),
    *("keep", "only", "forbid", "smallest_width", "keep_patches", "metric", "latency", "latency_batch"),
    # Other images would train what is validated, or be other inputs than those of scores and repair.
    *(f"images.{name}" for name in ("held_out", "mean", "std", "crop", "background")),
)

logger = logging.getLogger("spvit")


class RunFolder:
    """The folder of one run. Making one touches nothing; several processes may, and one of them writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.settings = self.path / "config.yaml"
        self.settings_kept = self.path / "state" / "config.yaml"
        self.headers = self.path / "state" / "images" / "headers.safetensors"
        self.unreadable = self.path / "unreadable.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tracking = self.path / "tracking.json"
        self.architecture = self.path / "architecture.json"
        self.scores = self.path / "scores.json"
        self.latency_table = self.path / "latency_table.json"
        self.dense = self.path / "dense"
        self.summary = self.path / "summary.json"
        self.latency = self.path / "latency.json"
        self.frontier = self.path / "frontier.json"
        self.report = self.path / "report.html"

    @classmethod
    def open(cls, path: str | Path, resume: bool = False) -> "RunFolder":
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
        """Whether the folder holds anything that is not hidden."""
        return self.path.is_dir() and any(not path.name.startswith(".") for path in self.path.iterdir())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out of the folder, and remove what one that was killed left unfinished.

        When the run is refused before there is more than settings and scores, they go too; a folder that was there,
        empty, stays. Raises RunFolderError when another run is at work here.
        """
        from spvit.train.processes import (
            by_the_first,
            processes,
        )  # brings Accelerate, which who only reads a folder needs not

        made, fresh = [folder for folder in (self.path, *self.path.parents) if not folder.exists()], not self.used
        first = {self.settings, self.settings_kept, self.headers, self.unreadable, self.latency_table}
        first |= {self.scores, self.scores.with_suffix(".safetensors")}
        with ExitStack() as lock:
            by_the_first(lambda: lock.enter_context(locked(self.path)))
            for path in self.path.rglob(f".*{UNFINISHED}"):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            try:
                yield
            except SpvitError as error:
                if not processes().is_main_process:
                    raise
                files = [path for path in self.path.rglob("*") if path.is_file() and not path.name.startswith(".")]
                left = {path for path in files if path not in first and path.parent != self.states(SCORE)}
                if fresh and not left and not isinstance(error, RunError):
                    for path in files:
                        path.unlink(missing_ok=True)
                    for folder in (self.settings_kept.parent, *([self.path] if made else [])):
                        shutil.rmtree(folder, ignore_errors=True)
                elif isinstance(error, RunError) and not isinstance(error, RunStoppedError):
                    with suppress(OSError):
                        self.record({"event": "failure", "message": str(error)})
                raise
            finally:
                lock.close()
                for folder in made:
                    with suppress(OSError):  # it is not empty, or gone
                        folder.rmdir()

    def write_settings(self, command: str, text: str) -> None:
        """Write a command's settings, given as YAML; makes the folder."""
        make_folder(self.settings_kept.parent)
        for path in (self.settings_kept, self.settings):
            write_text(path, f"# spvit {command}\n{text}")

    def settings_of(self, command: str) -> tuple[Path, Path]:
        """Return config.yaml, and what it was when the run last used it.

        Raises RunFolderError when there is none, it is damaged, or it is of another command.
        """
        if not self.settings.is_file():
            raise RunFolderError(f"output {self.path} holds no {self.settings.name}, so its run cannot be continued")
        kept = self.settings_kept if self.settings_kept.is_file() else self.settings
        for path, other in ((self.settings, kept), (kept, self.settings)):
            if why := _why_damaged(path):
                copy = f"copy {other}, which is whole, to it"
                advice = "start the run anew in another folder" if _why_damaged(other) else copy
                raise RunFolderError(f"{path} is damaged ({why}); {advice}")
        first = kept.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
        if first != f"# spvit {command}":
            raise RunFolderError(f"output {self.path} holds a run of {first[2:]!r}, not of 'spvit {command}'")
        return self.settings, kept

    def command_and_settings(self) -> tuple[str, dict[str, Any]]:
        """Return the command that the run is of, and its settings; "" and none of a folder that no run has written.

        Raises RunFolderError when config.yaml is damaged.
        """
        if not self.settings.is_file():
            return "", {}
        text = self.settings.read_text(encoding="utf-8", errors="replace")
        try:
            settings = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RunFolderError(f"{self.settings} is damaged: {' '.join(str(error).split())}") from error
        first = text.partition("\n")[0]
        command = first.removeprefix("# spvit ") if first.startswith("# spvit ") else ""
        return (command, settings) if isinstance(settings, dict) else ("", {})

    def figures(self) -> dict[str, dict[str, float]]:
        """Return summary.json: figures by what they are of. Empty where there is none; RunFolderError if damaged."""
        if not self.summary.is_file():
            return {}
        try:
            found = json.loads(self.summary.read_text(encoding="utf-8")).items()
            return {
                name: {key: value if isinstance(value, int) else float(value) for key, value in own.items()}
                for name, own in found
            }
        except (ValueError, TypeError, AttributeError) as error:
            raise RunFolderError(f"{self.summary} is damaged ({error}); run its command again") from error

    def check_continued(self, before: Any, options: Any) -> None:
        """Raise RunFolderError when options differ from those of the run before where they must not."""
        pair = before, options
        for name in FIXED:
            own, other = (reduce(lambda part, key: getattr(part, key, None), name.split("."), each) for each in pair)
            if own != other:
                option = name.replace("_", "-")
                raise self._of_another(f"with --{option} {own}, not {other}", "continue it with its own")
        ways = {True: "a search", False: "scores, without a search"}
        own, other = (ways[hasattr(each, SEARCH) and each.search.epochs > 0] for each in pair)
        if own != other:
            raise self._of_another(f"that decides by {own}, not by {other}", "continue it with its own search.epochs")
        tuned = self.has_begun(FINETUNE)
        decided = tuned or self.scores.exists() or self.architecture.exists() or self.has_begun(SEARCH)
        for phase in [name for name, over in ((DENSE, decided), (SEARCH, tuned)) if over and hasattr(before, name)]:
            for name, value in vars(getattr(before, phase)).items():
                if value != getattr(getattr(options, phase), name):
                    ended = f"that has gone on from its {phase} phase, which had {phase}.{name} {value}"
                    raise self._of_another(ended, "continue it with that")

    def _of_another(self, what: str, advice: str) -> RunFolderError:
        return RunFolderError(f"output {self.path} holds a run {what}; {advice}, or name another folder")

    def record(self, values: Mapping[str, Any]) -> None:
        """Append a line of figures to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def list_unreadable(self, found: Mapping[str, str]) -> None:
        """Add images that cannot be read, and why, to unreadable.json."""
        known = json.loads(self.unreadable.read_text(encoding="utf-8")) if self.unreadable.is_file() else {}
        write_text(self.unreadable, json.dumps({**known, **found}, indent=2) + "\n")

    def steps_before(self, phase: str) -> int:
        """Return the steps that the other phases have recorded, all of which come before."""
        if not self.metrics.exists():
            return 0
        last: dict[str, int] = {}
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            name = values.get("phase", phase)
            last[name] = max(last.get(name, 0), values.get("step", 0))
        return sum(steps for name, steps in last.items() if name != phase)

    def recorded(self, phase: str, event: str) -> dict[str, Any] | None:
        """Return a phase's last line of figures of an event; None without any."""
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else []
        found = [json.loads(line) for line in lines if f'"{event}"' in line and line.endswith("}")]
        return next((line for line in found[::-1] if (line["phase"], line["event"]) == (phase, event)), None)

    def rewind(self, phase: str, epoch: int, step: int, steps: int) -> None:
        """Drop a phase's states and lines from after so many epochs and steps of the next, in all so many steps.

        A kill cut them short, or a damaged state lost them; they are run again.
        """
        for path in self._states(phase):
            if _place(path) > (epoch, step):
                path.unlink()
        if not self.metrics.exists():
            return
        *lines, _ = self.metrics.read_text(encoding="utf-8").split("\n")  # a kill can cut the last line short
        try:
            found = [(line, json.loads(line)) for line in lines]
        except json.JSONDecodeError as error:
            raise RunFolderError(f"{self.metrics} is damaged ({error}); move it away to continue the run") from error
        kept = [line for line, values in found if values.get("phase") != phase or _is_before(values, epoch, steps)]
        write_text(self.metrics, "".join(f"{line}\n" for line in kept))

    def states(self, phase: str) -> Path:
        """Return the folder of a phase's states."""
        return self.path / "state" / phase

    def has_begun(self, phase: str) -> bool:
        """Return whether a phase has saved anything."""
        return any(self.states(phase).glob("*.safetensors"))

    def newest_state(self, phase: str) -> Path | None:
        """Return the last saved state; None when there is none."""
        return max(self._states(phase), key=_place, default=None)

    def _states(self, phase: str) -> list[Path]:
        return list(self.states(phase).glob("epoch-*"))

    def save_state(
        self,
        phase: str,
        epoch: int,
        step: int,
        tensors: dict[str, Tensor],
        figures: Mapping[str, float],
        images: Mapping[str, int],
    ) -> None:
        """Write the state after so many epochs and steps of the next, with the last evaluation; but two older go.

        images: how many there are, of training and of validation.
        """
        name = f"epoch-{epoch:04d}{f'-{step:06d}' if step else ''}.safetensors"
        about = {"epoch": epoch, "step": step, "figures": figures, "images": images}
        write_state(self.states(phase) / name, tensors, about)
        for old in sorted(self._states(phase), key=_place)[:-KEPT_STATES]:
            old.unlink()

    def read_state(self, phase: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return a phase's last state that is whole: `epoch`, `step` and `figures`, and tensors; nothing if none.

        Raises RunFolderError when none of its states can be read.
        """
        states = sorted(self._states(phase), key=_place, reverse=True)
        for path in states:
            try:
                return read_state(path)
            except CheckpointError as error:
                logger.warning("%s; the state before it is used", error)
        if states:
            advice = "remove that folder to begin the phase again"
            raise RunFolderError(f"no state in {self.states(phase)} is whole; {advice}")
        return {"epoch": 0, "step": 0, "figures": {}}, {}

    def check_images(self, before: Mapping[str, int], now: Mapping[str, int]) -> None:
        """Raise RunFolderError when there are not as many images as when a state was saved."""
        if before != now:
            found, other = (" and ".join(f"{count:,} {name}" for name, count in each.items()) for each in (before, now))
            raise self._of_another(f"on {found} images, and there are {other} now", "put back its own")

    def keep_best(self, phase: str, epoch: int, name: str, accuracy: float, tensors: dict[str, Tensor]) -> None:
        """Write the best weights of a phase so far, named in words, or equally good ones."""
        best, path = self.best(phase)
        gained = epoch if accuracy > best["accuracy"] else best["gained"]
        write_state(path, tensors, {"epoch": epoch, "name": name, "gained": gained, "accuracy": accuracy})

    def best(self, phase: str) -> tuple[dict[str, Any], Path]:
        """Return what is known of a phase's best weights, and their file; without any the accuracy is below 0.

        Known are their `epoch`, their `name`, their `accuracy`, and `gained`, the first epoch that had it.
        """
        path = self.states(phase) / "best.safetensors"
        values: Any = about_state(path) if path.is_file() else {"epoch": 0, "accuracy": -1.0}
        return {"gained": values["epoch"], "name": f"epoch {values['epoch']}", **values}, path

    def drop_damaged_best(self, phase: str) -> None:
        """Remove a phase's best weights if they are damaged; the best from here on are kept."""
        path = self.states(phase) / "best.safetensors"
        try:
            _ = path.is_file() and read_state(path)
        except CheckpointError as error:
            logger.warning("%s; the best weights from here on are kept", error)
            path.unlink()

    def write_scores(self, scores: Scores) -> None:
        """Write what scoring measured, as a whole."""
        with tempfile.TemporaryDirectory(dir=self.path, prefix=".", suffix=UNFINISHED) as partial:
            Path(partial).chmod(self.path.stat().st_mode)
            scores.save(partial)
            for path in (self.scores.with_suffix(".safetensors"), self.scores):  # the second says that both are there
                replace_atomically(path, (Path(partial) / path.name).replace)
        shutil.rmtree(self.states(SCORE), ignore_errors=True)

    def write_architecture(self, architecture: Architecture) -> None:
        """Write architecture.json. Raises RunFolderError when weights of another one were fine-tuned here already."""
        path = self.architecture
        if self.has_begun(FINETUNE) and path.is_file() and Architecture.load(path) != architecture:
            advice = "continue it with the settings that it was begun with, or name another folder"
            raise RunFolderError(f"{self.path} has fine-tuned another architecture than what was found now; {advice}")
        write_text(path, architecture.to_json())


def _why_damaged(path: Path) -> str:
    """Return why a file of settings is damaged, or nothing where it is not."""
    try:
        found = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return " ".join(str(error).split())
    return "" if isinstance(found, yaml.MappingNode) else "it holds no settings"


def _place(path: Path) -> tuple[int, int]:
    """Return how many epochs were done when a state was saved, and how many steps of the next."""
    _, epoch, *step = path.stem.split("-")
    return int(epoch), int(step[0]) if step else 0


def _is_before(values: Mapping[str, Any], epochs: int, steps: int) -> bool:
    """Return whether a line of metrics.jsonl is of a phase's first epochs, or of its first steps."""
    return values["epoch"] <= epochs or (values["event"] == "step" and values["step"] <= steps)
