"""From a dense model to a compressed one: train, score or search, decide, prune, repair, fine-tune, write.

`run_compress` does it in order. Every step leaves its result in the run folder; a continued run starts from these.
"""

import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Subset

from spvit.architecture import DEFAULT_MULTIPLE, Architecture
from spvit.budget import DEFAULT_BUDGET, Budget, check_multiple
from spvit.checkpoint import Preprocessing, plain_state, save, write_text
from spvit.decide import decide
from spvit.errors import CalibrationError, DataError
from spvit.hosts.host import Host, input_size
from spvit.hosts.recognise import family_of
from spvit.hosts.walk import Report
from spvit.models import number_of_classes
from spvit.repair.choose import check_reachable
from spvit.repair.scores import Scores, score
from spvit.replacements.costs import network_costs
from spvit.search.budget_loss import BudgetLoss
from spvit.search.network import make_searchable
from spvit.search.read_off import check_counted
from spvit.speed.latency import LatencyTable, measure
from spvit.surgery import fold, prune, pruned_record
from spvit.train.data import Images, calibration, load_images
from spvit.train.figures import Figures, figures_of, reference_of
from spvit.train.headers import checked
from spvit.train.kept_views import KEPT_VIEWS, MEMORY, compare_with_kept, fastest_precision, keep_views, most_views
from spvit.train.loop import Phase, Run, run_phase
from spvit.train.processes import by_the_first, processes, use_device
from spvit.train.progress import PhaseProgress
from spvit.train.rate import with_rate
from spvit.train.run_folder import DENSE, FINETUNE, REPAIR, SCORE, SEARCH, RunFolder
from spvit.train.settings import CompressConfig, ImageConfig, PhaseConfig, ScoresConfig, SearchConfig
from spvit.train.states import BlockStates, checksum

Made = TypeVar("Made")


@dataclass(frozen=True)
class Compressed:
    """The folded model and the host as its dense phase left it, with figures: dense, just pruned, and at the end."""

    model: nn.Module
    host: nn.Module
    architecture: Architecture
    dense: Figures
    after_pruning: Figures
    pruned: Figures


def compress(
    host: nn.Module,
    data: str | Images,
    macs: str | int | None = None,
    *,
    params: str | int | None = None,
    latency: str | None = None,
    output: str | Path | None = None,
    config: CompressConfig | None = None,
    images: ImageConfig | None = None,
    preprocessing: Preprocessing | None = None,
    resume: bool = False,
    console: Console | None = None,
    report: Report | None = None,
) -> nn.Module:
    """Return the host compressed to a budget: decided, pruned, repaired, fine-tuned, folded.

    Args:
        host: a trained model of a supported family; it stays as it is.
        data: what `--data` takes, such as a folder, labelled or not, or loaded Images. Without labels, and for a host
            without classes, the dense host is what to agree with.
        macs: `"50%"` of the host's cost, `"1.0G"` or a whole number of MACs of one image; half when no budget is given.
        params: the same in parameters; give at most one of the three.
        latency: `"60%"` of the host's, or `"8ms"`, of one pass of `config.latency_batch` images, measured here.
        output: run folder to keep metrics, states and the model in; None keeps nothing but the returned model.
        config: settings of the phases.
        images: how `data` is read and augmented.
        preprocessing: normalisation of the host; ImageNet's when None.
        resume: continue the run that `output` holds.
        console: a rich console to show progress on; None is silent.
        report: called, in the first process, with (phase, steps done, steps in all, figures) after each step of
            `headers`, `dense`, `score`, `search`, `repair`, `views` and `finetune`: figures are the losses of training
            known last, and after each epoch, once more, those of its evaluation. What it raises ends the run.

    Raises:
        BudgetError, DataError, ModelError, UnsupportedHostError, RunFolderError: bad input, before anything is trained.
        RunError: training failed; the run folder keeps the last good state.
    """
    budget = Budget.parse(macs, params, latency, default=DEFAULT_BUDGET)
    settings = config or CompressConfig()
    use_device(settings.device)
    if isinstance(data, str):
        data = load_images(data, images or ImageConfig(), input_size(host), preprocessing or Preprocessing())
    with tempfile.TemporaryDirectory() as temporary:
        folder = RunFolder(temporary) if output is None else RunFolder.open(output, resume)
        progress = PhaseProgress(console, report if processes().is_main_process else None)
        with folder.held():
            return run_compress(host, budget, settings, Run(data, folder, settings, progress)).model


def run_compress(host: nn.Module, budget: Budget, config: CompressConfig, run: Run) -> Compressed:
    """Compress a host into a run folder, continuing from what the folder has. The host itself is not changed."""
    run = replace(run, images=fitting(run.images, host))
    limits = check_compress(host, budget, config, run)
    run.folder.path.mkdir(parents=True, exist_ok=True)
    run = chooser = checked(run)
    if not run.images.classes and config.finetuning.epochs > 0:
        chooser, run = (replace(run, images=images) for images in halves(run.images))
    dense = copy.deepcopy(host).to(processes().device)
    if config.dense.epochs > 0:
        dense_figures = run_phase(Phase(DENSE, dense, config.dense), run)
        write_model(dense, dense_figures, run.images, run.folder.dense)
    else:
        run, dense_figures = judged(dense, config, run)
        run.progress.note(f"dense model: {dense_figures.words}")
    net = None
    if config.search.epochs > 0:
        net, architecture = search(dense, limits, config.search, run, config.multiple)
    else:
        architecture = decided(run.folder, lambda: _by_scores(dense, limits, config, run))
    weights = net if config.initialise == "search" else None
    if config.repair:
        pruned = _repaired(dense, architecture, weights, config, run)
    else:
        set_seed(config.seed)  # a continued run starts from the same weights where they are drawn
        pruned = prune(dense, architecture, weights=weights)
    [after_pruning] = figures_of([pruned], run.images, config, run.reference)
    figures = after_pruning
    run.progress.note(f"after pruning{' and repair' if config.repair else ''}: {after_pruning.words}")
    if config.finetuning.epochs > 0:
        if chooser is not run:
            chooser, _ = judged(dense, config, chooser)
        started = time.monotonic()
        chooser = keeping_views(FINETUNE, config.finetuning, chooser)
        phase = with_rate(Phase(FINETUNE, pruned, config.finetuning, teacher=dense), chooser, started)
        figures = run_phase(phase, chooser)
        if chooser.kept is not None and chooser.reference is not None:
            compare_with_kept(figures.quality, chooser.kept, pruned, chooser.images, chooser.reference, config)
        if chooser is not run:  # these have chosen nothing
            [figures] = figures_of([pruned], run.images, config, run.reference)
    model = deployed(pruned)
    write_model(model, figures, run.images, run.folder.path)
    costs = {
        metric: {"dense": cost.dense, "pruned": cost.of(architecture)} for metric, cost in network_costs(dense).items()
    }
    summary = {"dense": vars(dense_figures), "after_pruning": vars(after_pruning), "pruned": vars(figures), **costs}
    by_the_first(lambda: write_text(run.folder.summary, json.dumps(summary, indent=2) + "\n"))
    return Compressed(model, dense.eval(), architecture, dense_figures, after_pruning, figures)


def check_compress(
    host: nn.Module, budget: Budget, config: CompressConfig, run: Run, weights: bool = True
) -> dict[str, Any]:
    """Refuse what cannot work before anything is trained; return the budget, and open the teachers, with `weights`."""
    searched, known, objective = config.search.epochs > 0, None, config.objective
    limits = check_decision(host, budget, config.multiple, searched)
    if config.scores is not None:
        scores = Scores.load(config.scores)
        scores.check_objective(config.objective)
        objective = scores.objective
        if weights:
            scores.check(Host.of(host))
            known = scores.blocks
    if not searched and budget.metric != "latency":  # which is measured first
        check_reachable(Host.of(host), budget, config.multiple, config, known, objective)
    if not run.images.classes:
        _check_unlabelled(config)
    for name, phase in _phases(config).items():
        most_views(name, phase, run.images)
        if phase.teacher is not None:
            run.teacher(phase.teacher, weights)
    return limits


def fitting(images: Images, host: nn.Module) -> Images:
    """Return images without their classes for a host that tells none apart. Raises DataError: it tells others apart."""
    if family_of(host).classes(host) < 2:
        return replace(images, classes=())
    if images.classes and number_of_classes(host) != (count := len(images.classes)):
        found = f"the images have {count} classes, but the host tells {number_of_classes(host)} apart"
        raise DataError(f"{found}; give it a head of as many")
    return images


def halves(images: Images) -> tuple[Images, Images]:
    """Return images with one half of the validation images, to choose weights by, and with the other, to report on."""
    validation: Any = images.validation
    count = len(validation)
    first, second = (range(start, count, 2) if count > 1 else range(count) for start in (0, 1))
    return replace(images, validation=Subset(validation, first)), replace(images, validation=Subset(validation, second))


def judged(dense: nn.Module | Host, config: ScoresConfig, run: Run) -> tuple[Run, Figures]:
    """Return a run with the dense model to agree with, where the images have no classes, and the model's figures."""
    if not run.images.classes:
        run = replace(run, reference=reference_of(dense, run.images, config, config.objective))
    [figures] = figures_of([Host.of(dense).model], run.images, config, run.reference)
    return run, figures


def _phases(config: CompressConfig) -> dict[str, PhaseConfig]:
    """Return the phases that train, by name, in their order."""
    phases: dict[str, PhaseConfig] = {DENSE: config.dense, SEARCH: config.search, FINETUNE: config.finetuning}
    return {name: phase for name, phase in phases.items() if phase.epochs > 0}


def _check_unlabelled(config: CompressConfig) -> None:
    """Raise DataError when a phase needs labels."""
    for name, phase in _phases(config).items():
        if name != FINETUNE:
            raise DataError(f"{name}.epochs is {phase.epochs}, but there are no labels to train by; leave it out")
        if phase.teacher is not None:
            raise DataError(f"{name}.teacher is named, but without labels the dense model teaches; leave it out")


def check_decision(host: nn.Module, budget: Budget, multiple: int | None, searched: bool = True) -> dict[str, Any]:
    """Return the budget as an argument of `decide`. Raises BudgetError when it is out of reach, or not for a search."""
    check_multiple(multiple)
    if searched:
        check_counted(budget)
    if budget.metric == "latency":
        return budget.stated
    return {budget.metric: budget.target(network_costs(host)[budget.metric])}


def keeping_views(name: str, settings: PhaseConfig, run: Run) -> Run:
    """Return a run whose training images are views with the dense model's answers, if a phase of a name keeps some."""
    images, reference = run.images, run.reference
    count = most_views(name, settings, images)
    found = run.folder.recorded(name, KEPT_VIEWS)
    count = count if found is None else found["views"]
    if count == 0 or reference is None:
        return run
    limit = MEMORY if settings.kept_views is None else None
    precision = run.config.precision
    if precision == "auto":
        precision = fastest_precision(reference.host) if found is None else found.get("precision", "fp32")
    config = replace(run.config, precision=precision)
    with run.progress.bar("views", -(-count // images.config.batch_size)):
        hidden = settings.distillation_hidden != 0
        kept = keep_views(count, images, reference, config, hidden, limit, run.progress.step)
    views = 0 if kept is None else len(kept)
    if found is None:
        own = {"phase": name, "event": KEPT_VIEWS, "epoch": 0, "views": views, "precision": precision}
        by_the_first(lambda: run.folder.record(own))
    if kept is None:
        return run
    where = f"with the dense model's answers in memory, in {precision}"
    run.progress.note(f"{name}: {views:,} views, the same in each epoch, {where}")
    # Processes that read would each have a copy.
    images = replace(images, train=kept, config=replace(images.config, workers=0))
    return replace(run, images=images, config=config, kept=kept)


def search(
    host: nn.Module, limits: dict[str, Any], settings: SearchConfig, run: Run, multiple: int | None = None
) -> tuple[nn.Module, Architecture]:
    """Return the searched network of a host and its architecture, within limits such as `{"macs": "50%"}`."""
    set_seed(run.config.seed)
    phase = search_phase(host, limits, settings)
    run_phase(phase, run)
    return phase.model, decided(run.folder, lambda: decide(phase.model, multiple=multiple, **limits))


def search_phase(host: nn.Module, limits: dict[str, Any], settings: SearchConfig) -> Phase:
    """Return the phase of a search, on a searchable copy of the host, which teaches if the settings distil."""
    net = make_searchable(host, temperature=settings.temperature, gate_logit=settings.gate_logit)
    return Phase(SEARCH, net, settings, BudgetLoss(net, weight=settings.budget_weight, **limits), teacher=host)


def _repaired(
    dense: nn.Module, architecture: Architecture, weights: nn.Module | None, config: CompressConfig, run: Run
) -> nn.Module:
    """Return a pruned model as the first process repairs it, block by block in the run folder."""
    finished = block_states(REPAIR, dense if weights is None else weights, config, run, architecture.to_json())

    def repair(views: Iterable[Tensor]) -> nn.Module:
        set_seed(config.seed)  # a continued run starts from the same weights where they are drawn
        more: dict[str, Any] = {"report": run.progress.count, "finished": finished}
        return prune(dense, architecture, weights=weights, repair=views, **more)

    views = calibration(run.images, config.seed, config.repair_views * config.calibration_images)
    return repaired(repair, views, len(architecture.blocks), run)


def repaired(repair: Callable[[Iterable[Tensor]], Made], views: Iterable[Tensor], blocks: int, run: Run) -> Made:
    """Return what the first process makes of views; the others make it of the blocks that it has finished."""
    made: list[Made] = []
    with run.progress.bar(REPAIR, blocks):
        by_the_first(lambda: made.append(repair(views)))
        return made[0] if made else repair(())


def block_states(phase: str, model: nn.Module, config: ScoresConfig, run: Run, *more: str) -> BlockStates:
    """Return what a run has finished of scores or a repair, with the same weights and by the same images."""
    images: Any = run.images
    drawn = [asdict(images.config), asdict(images.preprocessing), len(images.views), config.seed]
    settings = [config.calibration_images, config.repair_views, config.multiple, config.objective]
    key = checksum(plain_state(model), {"of": [*drawn, *settings, *more]})
    return BlockStates(run.folder.states(phase), key)


def _by_scores(host: nn.Module, limits: dict[str, Any], config: CompressConfig, run: Run) -> Architecture:
    """Return the architecture that scores choose."""
    dense, budget = Host.of(host), Budget.parse(**limits)
    if budget.metric == "latency" and run.folder.architecture.is_file():  # which may be continued on another machine
        return Architecture.load(run.folder.architecture)
    table = timed(dense, config, run) if budget.metric == "latency" else None
    if table is not None:
        check_reachable(dense, budget, config.multiple, config, None, config.objective, table.cost)
    scored(dense, config, run)
    scores = Scores.load(run.folder.path)
    found = decide(dense, multiple=config.multiple, scores=scores, constraints=config, table=table, **limits)
    if table is not None:
        run.progress.note(f"latency measured: {table.timing(dense, found)}, asked for {limits['latency']}")
        table.save(run.folder.latency_table)
    return found


def timed(host: Host, config: ScoresConfig, run: Run) -> LatencyTable:
    """Return a host's latency table: the run folder's, that of a folder whose scores are taken, or a new one.

    Raises CalibrationError when that of the run folder is of another model, device or setting.
    """
    own = run.folder.latency_table
    given = [] if config.scores is None else [RunFolder(config.scores).latency_table]
    for path in filter(Path.is_file, [own, *given]):
        try:
            table = LatencyTable.load(path)
            table.check(host, config.latency_batch)
            return table
        except CalibrationError as error:
            if path == own:
                raise
            run.progress.note(f"{path} is left out: {error}")
    with run.progress.bar("latency", 0):
        table = measure(host, config.latency_batch, report=run.progress.count)
    table.save(own)
    return table


def scored(host: Host, config: ScoresConfig, run: Run) -> None:
    """Write a host's scores to the run folder: those that settings name, or new ones where it has none."""
    if config.scores is not None:
        run.folder.write_scores(Scores.load(config.scores))
    elif not run.folder.scores.is_file():
        finished = block_states(SCORE, host.model, config, run)
        with run.progress.bar(SCORE, len(host.blocks)):
            multiple = config.multiple or DEFAULT_MULTIPLE
            images = calibration(run.images, config.seed, config.calibration_images)
            more: Any = {"objective": config.objective, "report": run.progress.count, "finished": finished}
            found = score(host, images, multiple=multiple, **more)
        run.folder.write_scores(found)


def decided(folder: RunFolder, make: Callable[[], Architecture]) -> Architecture:
    """Let one process decide and write; all read what it wrote."""
    by_the_first(lambda: folder.write_architecture(make()))
    return Architecture.load(folder.architecture)


def deployed(model: nn.Module) -> nn.Module:
    """Return the form to deploy: folded if pruned, in evaluation mode."""
    return fold(model, inplace=True).eval() if pruned_record(model) is not None else model.eval()


def write_model(model: nn.Module, figures: Figures, images: Images, folder: Path) -> None:
    """Write a run's model with its preprocessing, classes if any, and figures; a continued run replaces its own."""
    metrics = {name: value for name, value in vars(figures).items() if name != "images"}
    own: dict[str, Any] = {"preprocessing": images.preprocessing, "classes": images.classes or None, "metrics": metrics}
    by_the_first(lambda: save(model, folder, overwrite=True, **own))
