"""Reads a run folder, whatever of it is there: of a run under way or failed, of old ones, of a saved model alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from torch import nn

from spvit.architecture import Architecture, dense
from spvit.checkpoint import DESCRIPTION, Description, describe, described_host, first_line
from spvit.cost import NetworkCost
from spvit.errors import RunFolderError, SpvitError
from spvit.hosts.host import Host
from spvit.hosts.sources import without_weights
from spvit.models import ModelConfig, names_code, open_model
from spvit.repair.scores import Scores
from spvit.replacements.costs import network_costs
from spvit.surgery import pruned_record
from spvit.train.run_folder import RunFolder

T = TypeVar("T")


@dataclass(frozen=True)
class Reading:
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
    latency: dict[str, list[dict[str, Any]]]
    lines: list[dict[str, Any]]
    """Of metrics.jsonl."""
    frontier: dict[str, Any]
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
        points = self.frontier.get("points") or [{}]
        return self.description is not None or bool(points[-1].get("latency"))

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


def read(folder: str | Path, host: nn.Module | Host | None = None) -> Reading:
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
    settings = attempt("settings", own.settings, lambda: _mapping(yaml.safe_load(text)), nothing)
    description = attempt("model", model, lambda: describe(run.path), None)
    architecture = attempt("architecture", run.architecture, lambda: Architecture.load(run.architecture), None)
    trained = attempt("dense model", run.dense / DESCRIPTION, lambda: describe(run.dense), None)
    unknown: dict[str, NetworkCost] = {}
    costs = attempt("costs", None, lambda: network_costs(_dense(host, description or trained, settings)), unknown)
    if architecture is None and description is not None:
        architecture = description.architecture
    if architecture is None and costs and not run.frontier.is_file():
        architecture = dense([block.units for block in costs["macs"].blocks])
    summary = attempt("figures", run.summary, lambda: _mapping(_json(run.summary)), nothing)
    latency = attempt("latency", run.latency, lambda: _mapping(_json(run.latency)), nothing)
    if own is whole:
        summary, latency = attempt(
            "figures", None, lambda: _of_budget(_frontier(whole.frontier), run), (nothing, nothing)
        )
    return Reading(
        folder=run,
        command=text.partition("\n")[0].removeprefix("# spvit ").strip() if text.startswith("# spvit ") else "",
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
        frontier=attempt("frontier", run.frontier, lambda: _frontier(run.frontier), nothing),
        problems=problems,
    )


def quality(figures: Mapping[str, Any]) -> tuple[str, float]:
    """Return what models are compared by, and how good one is: accuracy, or agreement where there are no labels."""
    name = "agreement" if figures.get("accuracy") is None else "accuracy"
    return name, figures[name]


def said(figures: Mapping[str, Any]) -> str:
    """Return how good a model is, as it is written."""
    name, value = quality(figures)
    return f"{value:.2%}" if name == "accuracy" else f"{value:.4f}"


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
        raise RunFolderError(f"{why}; pass the dense model: spvit.report(folder, host=model)")
    known = ("model_args", "pretrained", "checkpoint")
    return ModelConfig(model=name, **{key: settings[key] for key in known if key in settings})


def _dense(host: nn.Module | Host | None, description: Description | None, settings: dict[str, Any]) -> Host:
    """Return the dense network of a run, with any weights."""
    if host is not None:
        return Host.of(host)
    with without_weights():
        if description is not None:
            return described_host(description)
    model = open_model(model_config(settings), weights=False).model
    record = pruned_record(model)
    return Host.of(model) if record is None else described_host(describe(settings["model"]))


def _frontier(path: Path) -> dict[str, Any]:
    """Return what frontier.json holds: the dense model and one budget at least."""
    found = _mapping(_json(path))
    dense, *budgets = (_mapping(point) for point in found["points"])
    return {**found, "points": [dense, *budgets]} if budgets else {}


def _of_budget(frontier: dict[str, Any], run: RunFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the figures and the latency of a budget and of the dense model, as a run's own files hold them."""
    points, images = frontier["points"], frontier["images"]
    point = next(one for one in points if one["folder"] == run.path.resolve().name)
    both = {"dense": points[0], "pruned": point}
    figures = {name: {**dict([quality(one)]), "images": images} for name, one in both.items()}
    return figures, {name: one["latency"] for name, one in both.items()}


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RunFolderError(f"expected names with values, found {type(value).__name__}")
    return value


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of metrics.jsonl that can be read: a kill may have cut one short."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield _mapping(json.loads(line))
        except (json.JSONDecodeError, RunFolderError):
            continue
