"""Every budget from one scoring: score, then decide, prune, repair, evaluate and write for each, then measure all.

`run_frontier` does it in order; what it leaves in the folder is described in `points`.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from spvit.architecture import Architecture
from spvit.budget import Budget
from spvit.checkpoint import DESCRIPTION, Preprocessing, describe, load
from spvit.cost import METRICS
from spvit.decide import decide
from spvit.errors import BudgetError
from spvit.hosts.host import Host, input_size
from spvit.hosts.rebuild import can_build
from spvit.repair.choose import check_reachable
from spvit.repair.scores import Scores
from spvit.replacements.costs import network_costs
from spvit.speed.benchmark import Program, measure_batches
from spvit.speed.latency import LatencyTable, batches_to_measure
from spvit.surgery import prune_each
from spvit.train.compress import (
    block_states,
    decided,
    deployed,
    fitting,
    judged,
    repaired,
    scored,
    timed,
    write_model,
)
from spvit.train.data import Images, calibration, load_images
from spvit.train.figures import Figures, figures_of
from spvit.train.headers import checked
from spvit.train.loop import Run
from spvit.train.points import DENSE, FILE, Frontier, Point, plot_frontier
from spvit.train.processes import by_the_first, processes, use_device
from spvit.train.progress import PhaseProgress
from spvit.train.run_folder import REPAIR, RunFolder
from spvit.train.settings import FrontierConfig, ImageConfig

MEMORY, BESIDE = 6 * 2**30, 6
"""Bytes of tokens that a repair may hold, and how many models' tokens it takes beside those of each model."""
SECONDS = 0.15
"""Least time for each model and batch size; seven rounds of larger ones take longer."""
BUDGETS = ("75%", "60%", "50%", "35%", "25%")


def frontier(
    host: nn.Module,
    data: str | Images,
    budgets: Sequence[str | int] = BUDGETS,
    *,
    metric: str = "macs",
    output: str | Path,
    config: FrontierConfig | None = None,
    images: ImageConfig | None = None,
    preprocessing: Preprocessing | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> Frontier:
    """Return the host pruned to each of several budgets from one scoring, repaired, evaluated and measured.

    Nothing is trained. `spvit.load(f"{output}/50pct")` returns the model of a budget. Accuracy is that on the labelled
    validation images; without labels, and of a model without classes, the agreement with the dense model.

    Args:
        host: a trained model of a supported family; it stays as it is.
        data: as in `compress`.
        budgets: shares such as `"50%"`, amounts such as `"1.0G"`, or whole numbers.
        metric: what budgets are of: `macs`, `params` or `latency`.
        output: folder to write, new or empty.
        config: settings of scores, repair and measurement.
        images: how `data` is read and augmented.
        preprocessing: normalisation of the host; ImageNet's when None.
        resume: continue the frontier that `output` holds; budgets that are done are not done again.
        console: a rich console to show progress on; None is silent.

    Raises:
        BudgetError: a budget is malformed, or none can be reached.
        DataError, ModelError, UnsupportedHostError, RunFolderError: bad input.
    """
    settings = config or FrontierConfig()
    use_device(settings.device)
    if isinstance(data, str):
        data = load_images(data, images or ImageConfig(), input_size(host), preprocessing or Preprocessing())
    folder = RunFolder.open(output, resume)
    with folder.held():
        return run_frontier(host, budgets, metric, settings, Run(data, folder, settings, PhaseProgress(console)))


def run_frontier(
    host: nn.Module, budgets: Sequence[str | int], metric: str, config: FrontierConfig, run: Run
) -> Frontier:
    """Fill a run folder with a frontier, continuing from what the folder has. The host itself is not changed."""
    dense = Host.of(copy.deepcopy(host).to(processes().device).eval())
    run = replace(run, images=fitting(run.images, dense.model))
    folder = run.folder.path
    known = Frontier.load(folder).points if (folder / FILE).is_file() else ()
    done = {point.budget: point for point in known if (folder / str(point.folder) / DESCRIPTION).is_file()}
    table = None
    if metric == "latency":
        if processes().num_processes > 1:
            raise BudgetError("budgets of latency are measured in one process; start the frontier without others")
        folder.mkdir(parents=True, exist_ok=True)
        table = timed(dense, config, run)
    asked, unreached = _reachable(dense, [*budgets, *done], metric, config, table)
    folder.mkdir(parents=True, exist_ok=True)
    run = checked(run)
    if not _draws():
        run.progress.note("there will be no plot: pip install 'spvit[report]'")
    started = time.perf_counter()
    by_the_first(lambda: scored(dense, config, run))
    times, scores = {"scores": time.perf_counter() - started}, Scores.load(folder)
    scores.check(dense)
    run, figures = judged(dense, config, run)
    whole = _point(DENSE, None, dense.totals, figures)
    points = (whole, *(done[text] for text in asked if text in done))
    found = Frontier(type(host).__name__, metric, figures.images, points, unreached, times)
    run.progress.note(f"scores {times['scores']:.1f} s; dense model: {whole.words}")
    waiting: dict[str, Architecture] = {}
    for text in (text for text in asked if text not in done):
        limit: dict[str, Any] = {metric: text}
        try:
            architecture = decide(
                dense, multiple=config.multiple, scores=scores, constraints=config, table=table, **limit
            )
        except BudgetError as error:  # it lies between what widths in whole steps can land on
            unreached[text] = str(error)
            continue
        waiting[text] = architecture
        if table is not None:
            run.progress.note(f"{text}: {table.timing(dense, architecture)}")
            table.save(run.folder.latency_table)
    models: dict[str, nn.Module] = {}
    for new, made in _groups(waiting, dense, config, run):
        done, models = done | new, models | made
        found = replace(found, points=(whole, *(done[text] for text in asked if text in done)))
        by_the_first(partial(found.save, folder))
    for text, reason in unreached.items():
        run.progress.note(f"{text} is left out: {reason}")
    if len(found.points) == 1:
        raise BudgetError(next(iter(unreached.values())))
    return _measured(found, dense, models, config, run) if processes().is_main_process else found


def _groups(
    waiting: Mapping[str, Architecture], host: Host, config: FrontierConfig, run: Run
) -> Iterator[tuple[dict[str, Point], dict[str, nn.Module]]]:
    """Yield the points and models of some budgets, repaired and judged side by side, and written: as many as fit."""
    views: list[Tensor] = []
    costs = network_costs(host).items()
    size = _side_by_side(host, config.repair_views * config.calibration_images)
    for start in range(0, len(waiting), size):
        group, started = dict(list(waiting.items())[start : start + size]), time.perf_counter()
        folders = {text: RunFolder(run.folder.path / text.replace("%", "pct")) for text in group}
        for text, folder in folders.items():
            folder.path.mkdir(exist_ok=True)
            group[text] = decided(folder, partial(group.__getitem__, text))
        views = views or list(calibration(run.images, config.seed, config.repair_views * config.calibration_images))
        states = [
            block_states(REPAIR, host.model, config, replace(run, folder=folders[text]), architecture.to_json())
            for text, architecture in group.items()
        ]
        repair = partial(prune_each, host, list(group.values()), report=run.progress.count, finished=states)
        models = [deployed(own) for own in repaired(repair, views, len(host.blocks), run)]
        found = figures_of(models, run.images, config, run.reference)
        points = {}
        for (text, architecture), model, figures in zip(group.items(), models, found):
            write_model(model, figures, run.images, folders[text].path)
            spent = {name: cost.of(architecture) for name, cost in costs}
            seconds = (time.perf_counter() - started) / len(group)
            points[text] = _point(text, folders[text].path.name, spent, figures, seconds)
            by_the_first(partial(shutil.rmtree, folders[text].states(REPAIR).parent, ignore_errors=True))
            run.progress.note(f"{text}: {points[text].words}")
        yield points, dict(zip(group, models))


def _side_by_side(host: Host, images: int) -> int:
    """Return how many models are repaired side by side, whose tokens fit beside those of the dense network."""
    tokens = max(math.prod(block.attention.grid) + block.attention.prefix_tokens for block in host.blocks)
    width = max(block.attention.dim for block in host.blocks)
    stream = images * tokens * width * next(host.model.parameters()).element_size()
    return max(1, MEMORY // stream - BESIDE)


def _point(text: str, folder: str | None, costs: Mapping[str, int], figures: Figures, seconds: float = 0.0) -> Point:
    quality: dict[str, Any] = {name: getattr(figures, name, None) for name in ("accuracy", "agreement")}
    return Point(text, folder, costs["macs"], costs["params"], **quality, seconds=seconds)


def _measured(
    found: Frontier, host: Host, models: Mapping[str, nn.Module], config: FrontierConfig, run: Run
) -> Frontier:
    """Return a frontier with the latency of every point, measured in turns; write it and its plot."""
    started, folder = time.perf_counter(), run.folder.path
    programs = [Program.of(DENSE, host.model)]
    for point in found.points[1:]:
        model = models.get(point.budget)
        if model is None:
            path = folder / str(point.folder)
            given = None if can_build(describe(path).host) else host.model
            model = load(path, host=given).to(processes().device)
        programs.append(Program.of(point.budget, model))
    batches = batches_to_measure(config.batches, config.latency_batch if found.metric == "latency" else None)
    with run.progress.bar("latency", len(batches)):
        measured = measure_batches(programs, batches, SECONDS, run.progress.step)
    points = tuple(replace(point, latency=own) for point, own in zip(found.points, measured))
    found = replace(found, points=points, seconds={**found.seconds, "latency": time.perf_counter() - started})
    found.save(folder)
    if _draws():
        plot_frontier(found, folder)
    return found


def _draws() -> bool:
    return all(importlib.util.find_spec(name) for name in ("jinja2", "matplotlib"))


def _reachable(
    host: Host, budgets: Sequence[str | int], metric: str, config: FrontierConfig, table: LatencyTable | None
) -> tuple[list[str], dict[str, str]]:
    """Return the budgets that can be reached, the largest first, each once, and why others cannot."""
    known = (*METRICS, "latency")
    if metric not in known or not budgets:
        raise BudgetError(f"budgets are {list(budgets)} of {metric!r}, expected one or more, of {', '.join(known)}")
    targets: dict[int, str] = {}
    priced = None if table is None else table.cost
    unreached = {}
    for text in map(str, budgets):
        budget = Budget.parse(**{metric: text})
        try:
            target = check_reachable(host, budget, config.multiple, config, None, config.objective, priced)
            targets.setdefault(target, text)
        except BudgetError as error:
            unreached[text] = str(error)
    if not targets:
        raise BudgetError(next(iter(unreached.values())))
    return [targets[target] for target in sorted(targets, reverse=True)], unreached
