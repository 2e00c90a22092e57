"""Reads a run folder, whatever of it is there: of a run under way or failed, of old ones, of a saved model alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from spvit.architecture import Architecture, dense
from spvit.checkpoint import DESCRIPTION, Description, describe, described_host, load
from spvit.cost import NetworkCost
from spvit.errors import RunFolderError, SpvitError, first_line
from spvit.fields import from_data
from spvit.hosts.host import Host
from spvit.hosts.rebuild import without_weights
from spvit.models import ModelConfig, names_code, open_model
from spvit.repair.scores import Scores
from spvit.replacements.costs import network_costs
from spvit.speed.benchmark import Latency
from spvit.surgery import pruned_record
from spvit.train.figures import quality_of
from spvit.train.points import Frontier
from spvit.train.run_folder import RunFolder

T = TypeVar("T")


@dataclass(frozen=True)
class Contents:
    """What a run folder holds; None or empty: it does not, or what it holds cannot be read."""

    folder: RunFolder
    command: str
    """The command whose settings it holds, such as `compress`."""
    config: Path
    """Its config.yaml; of a budget of a frontier that of the whole."""
    settings: dict[str, Any]
    settings_text: str
    description: Description | None
    architecture: Architecture | None
    costs: dict[str, NetworkCost]
    scores: Scores | None
    summary: dict[str, Any]
    """Figures by model (`dense`, `after_pruning`, `pruned`), and costs by metric."""
    latency: dict[str, tuple[Latency, ...]]
    lines: list[dict[str, Any]]
    """Of metrics.jsonl."""
    frontier: Frontier | None
    """With one budget at least."""
    problems: dict[str, str]
    """What is missing or cannot be read, and why."""

    @property
    def failure(self) -> str | None:
        """Why the run failed; None if it did not, or was continued since."""
        last = self.lines[-1] if self.lines else {}
        return str(last.get("message")) if last.get("event") == "failure" else None

    @property
    def finished(self) -> bool:
        """Whether the run has written its result."""
        measured = self.frontier is not None and bool(self.frontier.points[-1].latency)
        return self.description is not None or measured

    def both(self, metric: str) -> tuple[int, int] | None:
        """Return what the dense network costs, and what is left of it; None where that is not known."""
        if metric in self.summary:
            return self.summary[metric]["dense"], self.summary[metric]["pruned"]
        if metric not in self.costs or self.architecture is None:
            return None
        return self.costs[metric].dense, self.costs[metric].of(self.architecture)

    @property
    def age_s(self) -> float:
        """Seconds since the run wrote anything."""
        files = [path for path in self.folder.path.rglob("*") if path.is_file() and not path.name.startswith("report")]
        return time.time() - max(path.stat().st_mtime for path in files)


def read(folder: str | Path, host: nn.Module | Host | None = None) -> Contents:
    """Return what a run folder holds. host: the dense model, for one that no library makes.

    Raises RunFolderError when the folder is none, or holds nothing of a run.
    """
    run, problems = RunFolder(folder), {}  # type: RunFolder, dict[str, str]
    if not run.path.is_dir():
        raise RunFolderError(f"{run.path} is not a folder; name the folder that a run has written")
    model = run.path / DESCRIPTION
    known = (run.settings, run.metrics, run.architecture, run.scores, run.summary, run.frontier, model)
    if not any(path.is_file() for path in known):
        raise RunFolderError(f"{run.path} is no run folder: it holds none of {', '.join(path.name for path in known)}")

    def attempt(part: str, path: Path | None, make: Callable[[], T], empty: T) -> T:
        return empty if path is not None and not path.is_file() else attempted(problems, part, make, empty)

    whole = RunFolder(run.path.parent)  # of which a budget's folder is a part
    own = whole if whole.frontier.is_file() and not run.settings.is_file() else run
    nothing: dict[str, Any] = {}
    text = attempt("settings", own.settings, lambda: own.settings.read_text(encoding="utf-8"), "")
    command, settings = attempt("settings", None, own.command_and_settings, ("", nothing))
    description = attempt("model", model, lambda: describe(run.path), None)
    architecture = attempt("architecture", run.architecture, lambda: Architecture.load(run.architecture), None)
    trained = attempt("dense model", run.dense / DESCRIPTION, lambda: describe(run.dense), None)
    unknown: dict[str, NetworkCost] = {}
    costs = attempt("costs", None, lambda: network_costs(_dense(host, description or trained, settings)), unknown)
    if architecture is None and description is not None:
        architecture = description.architecture
    if architecture is None and costs and not run.frontier.is_file():
        architecture = dense([block.units for block in costs["macs"].blocks])
    summary = attempt("figures", None, run.figures, nothing)
    latency = attempt("latency", run.latency, lambda: _latencies(run.latency), nothing)
    if own is whole:
        summary, latency = attempt(
            "figures", None, lambda: _of_budget(Frontier.load(whole.path), run), (nothing, nothing)
        )
    frontier = attempt("frontier", run.frontier, lambda: Frontier.load(run.path), None)
    return Contents(
        folder=run,
        command=command,
        config=own.settings,
        settings=settings,
        settings_text=text,
        description=description,
        architecture=architecture,
        costs=costs,
        scores=attempt("scores", run.scores, lambda: Scores.load(run.path), None),
        summary=summary,
        latency=latency,
        lines=attempt("curves", run.metrics, lambda: [*_lines(run.metrics)], []),
        frontier=frontier if frontier is not None and len(frontier.points) > 1 else None,
        problems=problems,
    )


def attempted(problems: dict[str, str], part: str, make: Callable[[], T], empty: T) -> T:
    """Return what is made of a part of a run; where that fails, what is empty, and note why among the problems."""
    try:
        return make()
    except Exception as error:  # whatever old or damaged files, and libraries that rebuild models, lead to
        kind = "" if isinstance(error, SpvitError) else f"{type(error).__name__}: "
        problems[part] = kind + first_line(error)
        return empty


def model_config(settings: dict[str, Any]) -> ModelConfig:
    """Return the model that settings name. Raises RunFolderError when they name none, or code, which no file may."""
    name = settings.get("model")
    if not isinstance(name, str) or names_code(name):
        why = "its settings name no model" if name is None else f"its model is {name}, which is code"
        advice = "pass the dense model: spvit.report(folder, host=model), or --dense of an export"
        raise RunFolderError(f"{why}; {advice}")
    known = ("model_args", "pretrained", "checkpoint")
    return ModelConfig(model=name, **{key: settings[key] for key in known if key in settings})


def dense_model(run: RunFolder, settings: dict[str, Any], classes: int | None = None) -> nn.Module:
    """Return the dense network of a run with the weights that it started from, or trained.

    Raises RunFolderError when its settings do not name a trained dense model, and what opening one raises.
    """
    if (run.dense / DESCRIPTION).is_file():
        return load(run.dense)
    opened = open_model(model_config(settings), classes)
    if not opened.trained or pruned_record(opened.model) is not None:
        raise RunFolderError(f"the run's model {settings['model']} is no trained dense one")
    return opened.model


def _dense(host: nn.Module | Host | None, description: Description | None, settings: dict[str, Any]) -> Host:
    """Return the dense network of a run, with any weights."""
    if host is not None:
        return Host.of(host)
    if description is not None:
        with without_weights(description.host["library"]):
            return described_host(description)
    model = open_model(model_config(settings), weights=False).model
    record = pruned_record(model)
    return Host.of(model) if record is None else described_host(describe(settings["model"]))


def _of_budget(frontier: Frontier, run: RunFolder) -> tuple[dict[str, Any], dict[str, tuple[Latency, ...]]]:
    """Return the figures and the latency of a budget and of the dense model, as a run's own files hold them."""
    point = next(one for one in frontier.points if one.folder == run.path.resolve().name)
    both = {"dense": frontier.points[0], "pruned": point}
    figures = {name: {**dict([quality_of(vars(one))]), "images": frontier.images} for name, one in both.items()}
    return figures, {name: one.latency for name, one in both.items()}


def _latencies(path: Path) -> dict[str, tuple[Latency, ...]]:
    found: dict[str, tuple[Latency, ...]] = from_data(
        dict[str, tuple[Latency, ...]], json.loads(path.read_text(encoding="utf-8")), path.name
    )
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of metrics.jsonl that can be read: a kill may have cut one short."""
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            values = json.loads(line)
            yield from [values] if isinstance(values, dict) else []
