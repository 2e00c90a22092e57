"""The whole way from a dense model to a compressed one: train, search or score, decide, prune, repair, fine-tune, save.

A run folder holds everything: metrics.jsonl, architecture.json, state/ (resumable), model.safetensors and model.json.
"""

import copy
import json
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate.utils import set_seed
from rich.console import Console
from torch import nn

from spvit.architecture import Architecture
from spvit.checkpoint import Preprocessing, save, write_text
from spvit.errors import RunFolderError
from spvit.hosts.recognise import family_of
from spvit.surgery import fold, prune, pruned_record
from spvit.train.data import ImageConfig, Images, load_images
from spvit.train.deciding import (
    CALIBRATION_IMAGES,
    calibration,
    check_calibration_images,
    check_decision,
    decide_from_scores,
    search,
)
from spvit.train.loaders import validation_loader
from spvit.train.loop import Evaluation, Phase, evaluate, make_accelerator, run_phase
from spvit.train.processes import processes
from spvit.train.progress import PhaseProgress
from spvit.train.settings import LoopConfig, PhaseConfig, SearchConfig
from spvit.train.teacher import check_dense_phase, check_phases


@dataclass(frozen=True, kw_only=True)
class CompressConfig(LoopConfig):
    """Settings of a whole compression."""

    dense: PhaseConfig = field(default_factory=lambda: PhaseConfig(epochs=0))
    """Training of the dense model beforehand, for a model that is not trained on these images yet."""
    search: SearchConfig = field(default_factory=lambda: SearchConfig(epochs=0))
    """The search for what to keep; with 0 epochs scores of the candidates decide, without training."""
    finetune: PhaseConfig = field(
        # A constant rate explores and the average from the repaired weights on gathers, at any length; a schedule that
        # ends low gains less, and a short one may lose (docs/benchmarks.md, "Fine-tuning a repaired network").
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
    initialise: str = "host"
    """Weights of the pruned model after a search: those of the `host`, as published (and then repaired), or of the
    `search`."""
    multiple: int | None = None
    """FFN widths and ranks of attention are multiples of it; when absent 8, or less for very small models."""


@dataclass(frozen=True)
class Compressed:
    """What a compression gave."""

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


def holds_files(folder: Path) -> bool:
    """Return whether a folder exists and is not empty."""
    return folder.is_dir() and any(folder.iterdir())


def check_folder(folder: str | Path, resume: bool) -> Path:
    """Return a run folder that may be written to. Raises RunFolderError when it is in use, or nothing can continue."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"output {folder} is a file; name a folder")
    used = holds_files(folder)
    if resume and not used:
        raise RunFolderError(f"output {folder} holds no run to continue; leave out --resume to start one")
    if used and not resume:
        raise RunFolderError(f"output {folder} is in use; name another folder, or continue its run with --resume")
    return folder


def train_dense(
    host: nn.Module, images: Images, folder: Path, config: LoopConfig, phase: PhaseConfig, progress: PhaseProgress
) -> Evaluation:
    """Train a model in place and return its figures (phase `dense`). Raises DataError when it distils from nobody."""
    check_dense_phase(phase)
    return run_phase(Phase("dense", host, phase), images, folder, config, progress)


def finetune(
    model: nn.Module,
    images: Images,
    folder: Path,
    config: LoopConfig,
    phase: PhaseConfig,
    progress: PhaseProgress,
    teacher: nn.Module | None = None,
) -> Evaluation:
    """Fine-tune a pruned model in place, by the teacher too if the phase distils, and return its figures."""
    return run_phase(
        Phase("finetune", model, phase, teacher=teacher if phase.distillation > 0 else None),
        images,
        folder,
        config,
        progress,
    )


def figures_of(model: nn.Module, images: Images, config: LoopConfig) -> Evaluation:
    """Return a model's figures on the validation images."""
    accelerator = make_accelerator(config)
    prepared, loader = accelerator.prepare(model, validation_loader(images))
    figures = evaluate(prepared, loader, accelerator)
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    accelerator.free_memory()
    return figures


def deployed(model: nn.Module) -> nn.Module:
    """Return the form to deploy: folded if pruned, in evaluation mode."""
    return fold(model).eval() if pruned_record(model) is not None else model.eval()


def write_model(model: nn.Module, images: Images, figures: Evaluation, folder: Path) -> None:
    """Write a run's model with its preprocessing, classes and figures; a continued run replaces its own."""
    if processes().is_main_process:
        metrics = {name: value for name, value in vars(figures).items() if name != "images"}
        save(
            model,
            folder,
            preprocessing=images.preprocessing,
            classes=images.classes,
            metrics=metrics,
            overwrite=True,
        )


def check_compress(
    host: nn.Module, images: Images, budget: dict[str, str | int], config: CompressConfig, weights: bool = True
) -> tuple[SearchConfig | None, PhaseConfig]:
    """Refuse a compression that cannot work before anything is trained; return its search, if any, and fine-tuning.

    Args:
        host: the dense model.
        images: training and validation images.
        budget: `{"macs": "50%"}` or `{"params": ...}`.
        config: settings.
        weights: whether to look at the teachers' weights too.
    """
    if config.initialise not in ("search", "host"):
        raise RunFolderError(f"initialise is {config.initialise!r}, expected search or host")
    if config.train_epochs is not None and config.train_epochs < 0:
        raise RunFolderError(f"train_epochs is {config.train_epochs}, expected 0 or more")
    check_decision(host, budget, config.multiple)
    check_calibration_images(config.calibration_images)
    searching = config.search if config.search.epochs > 0 else None
    finetuning = config.finetune
    if config.train_epochs is not None:
        finetuning = replace(finetuning, epochs=config.train_epochs)
    if config.train_epochs == 0 and searching is not None:
        raise RunFolderError(
            f"nothing is to be trained, but search.epochs is {searching.epochs}; leave one of the two out"
        )
    if config.dense.epochs > 0:
        check_dense_phase(config.dense)
    check_phases([config.dense, *([] if searching is None else [searching]), finetuning], images, weights)
    return searching, finetuning


def run_compress(
    host: nn.Module,
    images: Images,
    budget: dict[str, str | int],
    folder: Path,
    config: CompressConfig,
    console: Console | None = None,
) -> Compressed:
    """Compress a host into a run folder, continuing from the state that the folder has. The host itself is not changed.

    Args:
        host: the dense model.
        images: training and validation images.
        budget: `{"macs": "50%"}` or `{"params": ...}`.
        folder: the run folder.
        config: settings.
        console: where to show progress; None is silent.
    """
    searching, finetuning = check_compress(host, images, budget, config)
    folder.mkdir(parents=True, exist_ok=True)
    progress = PhaseProgress(console)
    dense = copy.deepcopy(host)
    if config.dense.epochs > 0:
        dense_figures = train_dense(dense, images, folder, config, config.dense, progress)
        write_model(dense, images, dense_figures, folder / "dense")
    else:
        dense_figures = figures_of(dense, images, config)
        progress.note(f"dense model: accuracy {dense_figures.accuracy:.2%}")
    needed = config.repair or searching is None
    calibrating = calibration(images, config.seed, config.calibration_images) if needed else None
    net, repairing = None, calibrating if config.repair else None
    if searching is not None:
        net, architecture = search(dense, images, budget, folder, config, searching, progress, config.multiple)
    else:
        assert calibrating is not None
        architecture = decide_from_scores(dense, calibrating, budget, folder, config.multiple, progress)
    if config.initialise != "search":
        net = None
    set_seed(config.seed)  # a continued run starts from the same weights where they are drawn
    pruned = prune(dense, architecture, weights=net, repair=repairing)
    after_pruning = figures_of(pruned, images, config)
    progress.note(
        f"after pruning{' and repair' if repairing is not None else ''}: accuracy {after_pruning.accuracy:.2%}"
    )
    if finetuning.epochs > 0:
        figures = finetune(pruned, images, folder, config, finetuning, progress, teacher=dense)
    else:
        figures = after_pruning
    model = deployed(pruned)
    write_model(model, images, figures, folder)
    _record_summary(folder, dense_figures, after_pruning, figures)
    return Compressed(model, dense.eval(), architecture, dense_figures, after_pruning, figures)


def _record_summary(folder: Path, dense: Evaluation, after_pruning: Evaluation, pruned: Evaluation) -> None:
    if processes().is_main_process:
        figures = {"dense": dense, "after_pruning": after_pruning, "pruned": pruned}
        text = json.dumps({name: vars(value) for name, value in figures.items()}, indent=2)
        write_text(folder / "summary.json", text + "\n")


def compress(
    host: nn.Module,
    data: str | Images,
    budget: str | int = "50%",
    *,
    metric: str = "macs",
    output: str | Path | None = None,
    config: CompressConfig | None = None,
    images: ImageConfig | None = None,
    preprocessing: Preprocessing | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> nn.Module:
    """Return the host compressed to a budget with spvit's own loop: decided, pruned, repaired, fine-tuned, folded.

    Args:
        host: a trained model of a supported family; it stays as it is.
        data: a folder with `train/` and `val/`, a torchvision data set by name, `digits`, or loaded Images.
        budget: `"50%"` of the host's cost, `"1.0G"` or a whole number.
        metric: what the budget counts: `macs` of one image, or `params`.
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
    if isinstance(data, str):
        size = family_of(host).input_size(host)
        data = load_images(data, images or ImageConfig(), size, preprocessing or Preprocessing())
    settings = config or CompressConfig()
    limits: dict[str, str | int] = {metric: budget}
    if output is None:
        with tempfile.TemporaryDirectory() as temporary:
            return run_compress(host, data, limits, Path(temporary), settings, console).model
    folder = check_folder(output, resume)
    return run_compress(host, data, limits, folder, settings, console).model
