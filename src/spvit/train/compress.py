"""From a dense model to a compressed one: train, score or search, decide, prune, repair, fine-tune, write.

`run_compress` does it in order. Every step leaves its result in the run folder; a continued run starts from these.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor, nn

from spvit.architecture import DEFAULT_MULTIPLE, Architecture
from spvit.budget import Budget, check_multiple
from spvit.checkpoint import Preprocessing, save
from spvit.decide import decide
from spvit.errors import DataError, RunFolderError
from spvit.hosts.host import Host, input_size
from spvit.repair.scores import Scores, score
from spvit.replacements.costs import network_costs
from spvit.search.budget_loss import BudgetLoss
from spvit.search.network import make_searchable
from spvit.surgery import fold, prune, pruned_record
from spvit.train.data import ImageConfig, Images, load_images
from spvit.train.loaders import training_loader, validation_loader
from spvit.train.loop import Evaluation, Phase, Run, evaluate, make_accelerator, run_phase
from spvit.train.processes import processes
from spvit.train.progress import PhaseProgress
from spvit.train.run_folder import DENSE, FINETUNE, SEARCH, RunFolder
from spvit.train.settings import LoopConfig, PhaseConfig, SearchConfig, check_settings
from spvit.train.teacher import open_teachers

CALIBRATION_IMAGES = 1024


@dataclass(frozen=True, kw_only=True)
class CompressConfig(LoopConfig):
    """Settings of a whole compression."""

    dense: PhaseConfig = field(default_factory=lambda: PhaseConfig(epochs=0))
    """Training of the dense model beforehand, for a model that is not trained on these images yet."""
    search: SearchConfig = field(default_factory=lambda: SearchConfig(epochs=0))
    """The search for what to keep; with 0 epochs scores decide, without training."""
    finetune: PhaseConfig = field(
        # A constant rate explores and the average from the repaired weights on gathers, at any length; a schedule that
        # ends low gains less, and a short one may lose (docs/experiments/fine-tuning.md).
        default_factory=lambda: PhaseConfig(
            minimum_learning_rate=PhaseConfig.learning_rate,
            warmup_epochs=0.2,
            distillation=0.5,
            averaging_epochs=1.0,
            keep_best=True,
        )
    )
    """Training of the pruned model."""
    train_epochs: int | None = None
    """Epochs of fine-tuning, in place of those of `finetune`; 0 trains nothing, and so allows no search."""
    repair: bool = True
    """Whether what pruning broke is repaired in closed form, from calibration images."""
    calibration_images: int = CALIBRATION_IMAGES
    """Training images for scores and repair; their labels are not used."""
    scores: str | None = None
    """A run folder whose scores to decide by, for another budget; when absent the model is scored."""
    initialise: str = "host"
    """Weights of the pruned model after a search: those of the `host`, as published (and then repaired), or of the
    `search`."""
    multiple: int | None = None
    """FFN widths and ranks of attention are multiples of it; when absent 8, or less for very small models."""


@dataclass(frozen=True)
class Steps:
    """What a compression will do, checked before anything is trained."""

    limits: dict[str, Any]
    """The budget as an argument of `decide`: MACs or parameters."""
    search: SearchConfig | None
    finetune: PhaseConfig
    teachers: dict[str, nn.Module]
    """The teachers that settings name, each opened once."""

    def teacher(self, phase: PhaseConfig, dense: nn.Module | None) -> nn.Module | None:
        """Return a phase's teacher: the one its settings name, or the dense model; None when it does not distil."""
        if phase.distillation == 0:
            return None
        return dense if phase.teacher is None else self.teachers[phase.teacher]


@dataclass(frozen=True)
class Compressed:
    """The result of a compression."""

    model: nn.Module
    """The pruned model, folded, in evaluation mode."""
    host: nn.Module
    """The dense model it was made from."""
    architecture: Architecture
    dense: Evaluation
    after_pruning: Evaluation
    """The pruned model's figures before fine-tuning."""
    pruned: Evaluation
    """The pruned model's figures at the end."""


def compress(
    host: nn.Module,
    data: str | Images,
    macs: str | int | None = None,
    *,
    params: str | int | None = None,
    output: str | Path | None = None,
    config: CompressConfig | None = None,
    images: ImageConfig | None = None,
    preprocessing: Preprocessing | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> nn.Module:
    """Return the host compressed to a budget: decided, pruned, repaired, fine-tuned, folded.

    Args:
        host: a trained model of a supported family; it stays as it is.
        data: a folder with `train/` and `val/`, a torchvision data set by name, `digits`, or loaded Images.
        macs: `"50%"` of the host's cost, `"1.0G"` or a whole number of MACs of one image; half when no budget is given.
        params: the same in parameters; give at most one of the two.
        output: run folder to keep metrics, states and the model in; None keeps nothing but the returned model.
        config: settings of the phases.
        images: how `data` is read and augmented.
        preprocessing: normalisation of the host; ImageNet's when None.
        resume: continue the run that `output` holds.
        console: a rich console to show progress on; None is silent.

    Raises:
        BudgetError, DataError, UnsupportedHostError, RunFolderError: bad input, before anything is trained.
        RunError: training failed; the run folder keeps the last good state.
    """
    budget = Budget.parse("50%" if macs is None and params is None else macs, params)
    settings = config or CompressConfig()
    if isinstance(data, str):
        data = load_images(data, images or ImageConfig(), input_size(host), preprocessing or Preprocessing())
    with tempfile.TemporaryDirectory() as temporary:
        folder = RunFolder(temporary) if output is None else RunFolder.open(output, resume)
        return run_compress(host, budget, settings, Run(data, folder, settings, PhaseProgress(console))).model


def run_compress(host: nn.Module, budget: Budget, config: CompressConfig, run: Run) -> Compressed:
    """Compress a host into a run folder, continuing from what the folder has. The host itself is not changed."""
    steps = check_compress(host, run.images, budget, config)
    run.folder.path.mkdir(parents=True, exist_ok=True)
    dense = copy.deepcopy(host).to(processes().device)
    if config.dense.epochs > 0:
        teacher = steps.teacher(config.dense, None)
        dense_figures = run_phase(Phase(DENSE, dense, config.dense, teacher=teacher), run)
        write_model(dense, dense_figures, run.images, run.folder.dense)
    else:
        dense_figures = figures_of(dense, run.images, config)
        run.progress.note(f"dense model: accuracy {dense_figures.accuracy:.2%}")
    net = None
    needed = config.repair or steps.search is None
    calibrating = calibration(run.images, config.seed, config.calibration_images) if needed else []
    if steps.search is not None:
        teacher = steps.teacher(steps.search, dense)
        net, architecture = search(dense, steps.limits, steps.search, run, config.multiple, teacher)
    else:
        architecture = _decide_by_scores(dense, steps.limits, calibrating, config, run)
    set_seed(config.seed)  # a continued run starts from the same weights where they are drawn
    pruned = prune(
        dense,
        architecture,
        weights=net if config.initialise == "search" else None,
        repair=calibrating if config.repair else None,
    )
    after_pruning = figures = figures_of(pruned, run.images, config)
    run.progress.note(f"after pruning{' and repair' if config.repair else ''}: accuracy {after_pruning.accuracy:.2%}")
    if steps.finetune.epochs > 0:
        teacher = steps.teacher(steps.finetune, dense)
        figures = run_phase(Phase(FINETUNE, pruned, steps.finetune, teacher=teacher), run)
    model = deployed(pruned)
    write_model(model, figures, run.images, run.folder.path)
    if processes().is_main_process:
        summary = {"dense": dense_figures, "after_pruning": after_pruning, "pruned": figures}
        run.folder.write_summary({name: vars(value) for name, value in summary.items()})
    return Compressed(model, dense.eval(), architecture, dense_figures, after_pruning, figures)


def check_compress(
    host: nn.Module, images: Images, budget: Budget, config: CompressConfig, weights: bool = True
) -> Steps:
    """Refuse a compression that cannot work before anything is trained; return what it will do.

    Without `weights` those of the teachers are not loaded, nor is the host expected to have its own.
    """
    if config.initialise not in ("search", "host"):
        raise RunFolderError(f"initialise is {config.initialise!r}, expected search or host")
    if config.train_epochs is not None and config.train_epochs < 0:
        raise RunFolderError(f"train_epochs is {config.train_epochs}, expected 0 or more")
    if config.calibration_images < 1:
        raise DataError(f"calibration_images is {config.calibration_images}, expected 1 or more")
    limits = check_decision(host, budget, config.multiple)
    if config.scores is not None:
        if config.search.epochs > 0 or config.dense.epochs > 0:
            raise RunFolderError(
                f"scores {config.scores} are of the model as it is, and decide without a search; leave them out, or "
                "dense.epochs and search.epochs"
            )
        scores = Scores.load(config.scores)
        if weights:
            scores.check(Host.of(host))
    searching = config.search if config.search.epochs > 0 else None
    finetuning = config.finetune
    if config.train_epochs is not None:
        finetuning = replace(finetuning, epochs=config.train_epochs)
    if config.train_epochs == 0 and searching is not None:
        raise RunFolderError(
            f"nothing is to be trained, but search.epochs is {searching.epochs}; leave one of the two out"
        )
    phases = [config.dense, *([] if searching is None else [searching]), finetuning]
    for phase in phases:
        check_settings(phase)
    return Steps(limits, searching, finetuning, open_teachers(phases, images, weights))


def check_decision(host: nn.Module, budget: Budget, multiple: int | None) -> dict[str, Any]:
    """Return the budget as an argument of `decide`, in MACs or parameters.

    Raises:
        NotSearchableError, UnsupportedHostError: the model is not a dense host of a supported family.
        BudgetError: the multiple is malformed, or the budget is out of reach.
    """
    check_multiple(multiple)
    return {budget.metric: budget.target(network_costs(host)[budget.metric])}


def search(
    host: nn.Module,
    limits: dict[str, Any],
    phase: SearchConfig,
    run: Run,
    multiple: int | None = None,
    teacher: nn.Module | None = None,
) -> tuple[nn.Module, Architecture]:
    """Search a host for what to keep; return the searched network and the architecture, which the run folder keeps.

    Args:
        host: the dense model; it stays as it is.
        limits: the budget, `{"macs": 500_000_000}` or `{"params": ...}`.
        phase: settings of the search.
        run: images, run folder and settings.
        multiple: FFN widths and ranks are multiples of it.
        teacher: the teacher of a search that distils.
    """
    set_seed(run.config.seed)
    net = searchable_for(host, phase)
    loss = BudgetLoss(net, weight=phase.budget_weight, **limits)
    run_phase(Phase(SEARCH, net, phase, loss, teacher), run)
    return net, _decided(run.folder, lambda: decide(net, multiple=multiple, **limits))


def searchable_for(host: nn.Module, phase: SearchConfig) -> nn.Module:
    """Return the searchable network that a search's settings ask for; the dense host stays as it is."""
    return make_searchable(host, temperature=phase.temperature, gate_logit=phase.gate_logit)


def calibration(images: Images, seed: int, count: int) -> list[Tensor]:
    """Return `count` training images, drawn by the seed, as batches [B, channels, height, width]."""
    set_seed(seed)
    batches: list[Tensor] = []
    missing = count
    for batch, _ in training_loader(images):
        batches.append(batch[:missing])
        missing -= len(batches[-1])
        if missing == 0:
            break
    return batches


def _decide_by_scores(
    host: nn.Module, limits: dict[str, Any], images: Sequence[Tensor], config: CompressConfig, run: Run
) -> Architecture:
    """Return the architecture that scores choose. A continued run keeps its own, and scores once."""
    folder = run.folder

    def by_scores() -> Architecture:
        if folder.architecture.is_file():
            ((metric, target),) = limits.items()
            folder.check_architecture(network_costs(host)[metric], target)
            return Architecture.load(folder.architecture)
        if config.scores is None and not folder.scores.is_file():
            with run.progress.bar("scores", len(Host.of(host).blocks)):
                multiple = config.multiple or DEFAULT_MULTIPLE
                found = score(host, images, multiple=multiple, report=lambda *done: run.progress.step())
            folder.write_scores(found)
        scores = Scores.load(folder.path if config.scores is None else config.scores)
        return decide(host, multiple=config.multiple, scores=scores, **limits)

    return _decided(folder, by_scores)


def _decided(folder: RunFolder, make: Callable[[], Architecture]) -> Architecture:
    """Let one process decide and write; all read what it wrote."""
    if processes().is_main_process:
        folder.write_architecture(make())
    processes().wait_for_everyone()
    return Architecture.load(folder.architecture)


def figures_of(model: nn.Module, images: Images, config: LoopConfig) -> Evaluation:
    """Return a model's figures on the validation images."""
    accelerator = make_accelerator()
    prepared, loader = accelerator.prepare(model, validation_loader(images))
    figures = evaluate(prepared, loader, accelerator, config.precision)
    accelerator.free_memory()
    return figures


def deployed(model: nn.Module) -> nn.Module:
    """Return the form to deploy: folded if pruned, in evaluation mode."""
    return fold(model).eval() if pruned_record(model) is not None else model.eval()


def write_model(model: nn.Module, figures: Evaluation, images: Images, folder: Path) -> None:
    """Write a run's model with its preprocessing, classes and figures; a continued run replaces its own."""
    if processes().is_main_process:
        metrics = {name: value for name, value in vars(figures).items() if name != "images"}
        own, classes = images.preprocessing, images.classes
        save(model, folder, preprocessing=own, classes=classes, metrics=metrics, overwrite=True)
