"""Every budget from one scoring: score, then decide, prune, repair, evaluate and write for each, then measure all.

`run_frontier` does it in order; what it leaves in the folder is described in `points`.
"""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from spvit.benchmark import Program, measure_latencies
from spvit.budget import Budget
from spvit.checkpoint import DESCRIPTION, Preprocessing, describe, load
from spvit.cost import METRICS
from spvit.decide import decide
from spvit.errors import BudgetError
from spvit.hosts.host import Host, input_size
from spvit.hosts.sources import can_build
from spvit.latency import LatencyTable
from spvit.repair.choose import check_reachable
from spvit.repair.scores import Scores
from spvit.replacements.costs import network_costs
from spvit.surgery import prune
from spvit.train.compress import calibration, check_classes, decided, deployed, fitting, scored, timed, write_model
from spvit.train.data import Images, load_images
from spvit.train.figures import Figures, figures_of, reference_of
from spvit.train.headers import checked
from spvit.train.loop import Run
from spvit.train.plot import plot_frontier
from spvit.train.points import DENSE, FILE, Frontier, Point
from spvit.train.processes import by_the_first, processes, use_device
from spvit.train.progress import PhaseProgress
from spvit.train.run_folder import RunFolder
from spvit.train.settings import FrontierConfig, ImageConfig

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
    check_classes(dense.model, run.images)
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
    if not importlib.util.find_spec("matplotlib"):
        run.progress.note("there will be no plot, since matplotlib is not installed: pip install 'spvit[report]'")
    started = time.perf_counter()
    by_the_first(lambda: scored(dense, config, run))
    times, scores = {"scores": time.perf_counter() - started}, Scores.load(folder)
    scores.check(dense)
    if not run.images.classes:
        run = replace(run, reference=reference_of(dense, run.images, config, config.objective))

    def judge(model: nn.Module) -> Figures:
        return figures_of(model, run.images, config, run.reference)

    figures = judge(dense.model)
    found = Frontier(type(host).__name__, metric, figures.images, (), unreached, times)
    found = replace(found, points=(_point(DENSE, None, dense.totals, figures),))
    run.progress.note(f"scores {times['scores']:.1f} s; dense model: {found.points[0].words}")
    views: list[Tensor] = []
    with run.progress.bar("budgets", len(asked)):
        for text in asked:
            if text not in done:
                views = views or list(
                    calibration(run.images, config.seed, config.repair_views * config.calibration_images)
                )
                try:
                    done[text] = _made(text, metric, dense, scores, views, judge, config, run, table)
                except BudgetError as error:  # it lies between what widths in whole steps can land on
                    unreached[text] = str(error)
                    continue
            found = replace(found, points=(*found.points, done[text]))
            by_the_first(partial(found.save, folder))
            run.progress.step()
            run.progress.note(f"{text}: {done[text].words}, {done[text].seconds:.1f} s")
    for text, reason in unreached.items():
        run.progress.note(f"{text} is left out: {reason}")
    if len(found.points) == 1:
        raise BudgetError(next(iter(unreached.values())))
    return _measured(found, dense, config, run) if processes().is_main_process else found


def _made(
    text: str,
    metric: str,
    host: Host,
    scores: Scores,
    views: list[Tensor],
    judge: Callable[[nn.Module], Figures],
    config: FrontierConfig,
    run: Run,
    table: LatencyTable | None,
) -> Point:
    """Return the point of a budget, whose model is written. Raises BudgetError when no architecture lands on it."""
    started, limit = time.perf_counter(), {metric: text}  # type: float, dict[str, Any]
    found = decide(host, multiple=config.multiple, scores=scores, constraints=config, table=table, **limit)
    if table is not None:
        run.progress.note(f"{text}: {table.timing(host, found)}")
        table.save(run.folder.latency_table)
    folder = RunFolder(run.folder.path / text.replace("%", "pct"))
    folder.path.mkdir(exist_ok=True)
    architecture = decided(folder, lambda: found)
    model = deployed(prune(host, architecture, repair=views))
    figures = judge(model)
    write_model(model, figures, run.images, folder.path)
    costs = {name: cost.of(architecture) for name, cost in network_costs(host).items()}
    return _point(text, folder.path.name, costs, figures, time.perf_counter() - started)


def _point(text: str, folder: str | None, costs: Mapping[str, int], figures: Figures, seconds: float = 0.0) -> Point:
    quality: dict[str, Any] = {name: getattr(figures, name, None) for name in ("accuracy", "agreement")}
    return Point(text, folder, costs["macs"], costs["params"], **quality, seconds=seconds)


def _measured(found: Frontier, host: Host, config: FrontierConfig, run: Run) -> Frontier:
    """Return a frontier with the latency of every point, measured in turns; write it and its plot."""
    started, folder = time.perf_counter(), run.folder.path
    programs = [Program.of(DENSE, host.model)]
    for point in found.points[1:]:
        path = folder / str(point.folder)
        given = None if can_build(describe(path).host) else host.model
        programs.append(Program.of(point.budget, load(path, host=given).to(processes().device)))
    batches = config.batches if found.metric != "latency" else dict.fromkeys((config.latency_batch, *config.batches))
    with run.progress.bar("latency", len(batches)):
        by_batch = []
        for batch in batches:
            by_batch.append(measure_latencies(programs, batch, seconds=0.5))
            run.progress.step()
    points = tuple(replace(point, latency=own) for point, *own in zip(found.points, *by_batch))
    found = replace(found, points=points, seconds={**found.seconds, "latency": time.perf_counter() - started})
    found.save(folder)
    if importlib.util.find_spec("matplotlib"):
        plot_frontier(found, folder)
    return found


def _reachable(
    host: Host, budgets: Sequence[str | int], metric: str, config: FrontierConfig, table: LatencyTable | None
) -> tuple[list[str], dict[str, str]]:
    """Return the budgets that can be reached, the largest first, each once, and why others cannot."""
    if metric not in (*METRICS, "latency") or not budgets:
        known = ", ".join((*METRICS, "latency"))
        raise BudgetError(f"budgets are {list(budgets)} of {metric!r}, expected one or more, of {known}")
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
