"""What `spvit compress --dry-run` prints: the run that a recipe stands for, and what it will take on this machine."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table
from torch import nn

from spvit.architecture import Architecture
from spvit.budget import Budget, human
from spvit.checkpoint import Preprocessing
from spvit.cli.inputs import check_trained, model_and_images
from spvit.cli.options import CompressCommand
from spvit.decide import decide
from spvit.errors import BudgetError, RunFolderError
from spvit.replacements.costs import network_costs
from spvit.search.budget_loss import BudgetLoss
from spvit.search.network import gated_layers, make_searchable
from spvit.surgery import prune
from spvit.train.compress import check_compress, check_folder
from spvit.train.data import ImageConfig, Images, images_of, load_images
from spvit.train.deciding import searchable_for
from spvit.train.loop import Phase, learning_rate_at, make_accelerator, prepared_loader
from spvit.train.optimizers import gate_learning_rate
from spvit.train.rehearsal import Rehearsal, rehearse
from spvit.train.settings import PhaseConfig, SearchConfig
from spvit.train.teacher import open_teacher

IMAGENET = "imagenet"
IMAGENET_TRAIN, IMAGENET_VALIDATION, IMAGENET_CLASSES = 1_281_167, 50_000, 1000
STAND_IN_SIZE = (375, 500)  # rows and columns that many of its images have


@dataclass(frozen=True)
class PlannedPhase:
    """One phase of the plan with what a few steps of it took."""

    name: str
    config: PhaseConfig
    steps: int
    """Steps an epoch, on each device."""
    measured: Rehearsal


class StandIn(Sequence[tuple[Any, int]]):
    """Pictures of noise in place of so many images that are not there."""

    def __init__(self, count: int) -> None:
        self.length = count
        self.picture = np.random.default_rng(0).integers(0, 256, (*STAND_IN_SIZE, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        return self.picture, index % IMAGENET_CLASSES


def print_plan(options: CompressCommand, console: Console) -> None:
    """Print phases, steps, learning rates, costs, memory and time of a run; read what it would read, write nothing.

    Raises:
        RunFolderError: the output folder is in use, or the plan of a run to resume is asked for.
        DataError, ModelError, BudgetError, ...: what the run itself would be refused for.
    """
    if options.resume:
        raise RunFolderError("--dry-run plans a new run from its start; leave out --resume")
    check_folder(options.output, resume=False)
    set_seed(options.seed)
    opened, images = model_and_images(options, options.data, options.images, weights=False, load=_images_or_stand_in)
    check_trained(opened, options.model, images, options.dense.epochs > 0)
    host, budget = opened.model, options.limits()
    searching, finetuning = check_compress(host, images, budget, options, weights=False)
    accelerator = make_accelerator(options)
    if not accelerator.is_main_process:
        console = Console(quiet=True)
    steps = len(prepared_loader(images, accelerator))
    architecture = example_architecture(host, budget, options.multiple)

    def planned(phase: Phase) -> PlannedPhase:
        console.print(f"measuring a few steps of {phase.name}", highlight=False)
        return PlannedPhase(phase.name, phase.config, steps, rehearse(_taught(phase, images), images, options))

    phases = []
    if options.dense.epochs > 0:
        phases.append(planned(Phase("dense", copy.deepcopy(host), options.dense)))
    if searching is not None:
        net = searchable_for(host, searching)
        loss = BudgetLoss(net, weight=searching.budget_weight, budget=Budget.parse(**budget))
        phases.append(planned(Phase("search", net, searching, loss, _own_teacher(host, searching))))
    if finetuning.epochs > 0:
        pruned = prune(host, architecture)
        phases.append(planned(Phase("finetune", pruned, finetuning, teacher=_own_teacher(host, finetuning))))
    devices = accelerator.num_processes
    _print_header(options, host, images, architecture, devices, console)
    if phases:
        console.print(_table(phases, images, devices))
    _print_footer(options, phases, images, devices, console)


def _images_or_stand_in(source: str, config: ImageConfig, size: tuple[int, int, int], own: Preprocessing) -> Images:
    """Return the images of a name; ImageNet's number of made-up ones for an imagenet folder that does not exist."""
    if not _stands_in(source):
        return load_images(source, config, size, own)
    classes = tuple(str(index) for index in range(IMAGENET_CLASSES))
    return images_of(StandIn(IMAGENET_TRAIN), StandIn(IMAGENET_VALIDATION), classes, config, size, own)


def _stands_in(source: str) -> bool:
    return Path(source).name.lower() == IMAGENET and not Path(source).exists()


def _own_teacher(host: nn.Module, config: PhaseConfig) -> nn.Module | None:
    return host if config.distillation > 0 and config.teacher is None else None


def _taught(phase: Phase, images: Images) -> Phase:
    """Return the phase with its teacher built, but without the teacher's weights, which would be downloaded."""
    if phase.config.teacher is None:
        return phase
    teacher = open_teacher(phase.config.teacher, images, weights=False)
    return replace(phase, config=replace(phase.config, teacher=None), teacher=teacher)


@torch.no_grad()
def example_architecture(host: nn.Module, budget: dict[str, str | int], multiple: int | None) -> Architecture:
    """Return an architecture of the budget to measure with before any search: FFNs narrowed evenly.

    Where narrowing alone does not reach the budget, attention goes too, from the first block on.
    """
    net = make_searchable(host)
    for attention, _ in gated_layers(net):
        try:
            return decide(net, multiple=multiple, macs=budget.get("macs"), params=budget.get("params"))
        except BudgetError:
            attention.gate_logits.fill_(-1.0)
    return decide(net, multiple=multiple, macs=budget.get("macs"), params=budget.get("params"))


def _print_header(
    options: CompressCommand,
    host: nn.Module,
    images: Images,
    architecture: Architecture,
    devices: int,
    console: Console,
) -> None:
    costs = network_costs(host)
    budget = Budget.parse(**options.limits())
    asked = costs[budget.metric]
    train, validation = _counts(images)
    stand_in = f" ({options.data} is not there; noise stands for its pictures)" if _stands_in(options.data) else ""
    batch = images.config.batch_size
    lines = [
        f"plan of spvit compress to {options.output}; nothing is written",
        f"model: {options.model}, {len(images.classes)} classes",
        f"before: {human(costs['params'].dense)} params, {human(costs['macs'].dense)} macs",
        f"budget: {human(budget.target(asked))} {budget.metric}, {budget.target(asked) / asked.dense:.1%} of the dense "
        "model's",
        f"expected after: {human(costs['macs'].of(architecture))} macs, {human(costs['params'].of(architecture))} "
        f"params ({budget.metric} within 0.5 % of the budget; the other depends on what is kept, here FFNs narrowed "
        "evenly)",
        f"images: {train:,} to train on, {validation:,} to validate on{stand_in}",
        f"batch: {batch} a device x {devices} = {batch * devices} a step; {options.precision}",
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _counts(images: Images) -> tuple[int, int]:
    return len(images.train), len(images.validation)  # type: ignore[arg-type]


def _epoch_s(phase: PlannedPhase, images: Images, devices: int) -> float:
    config = images.config
    train = phase.steps * config.batch_size
    return phase.measured.epoch_s(train, -(-_counts(images)[1] // devices), config.workers)


def _table(phases: Sequence[PlannedPhase], images: Images, devices: int) -> Table:
    """Return the phases side by side."""
    batch = images.config.batch_size
    table = Table("", title="phases", title_justify="left")
    rows: dict[str, list[str]] = {}
    for phase in phases:
        table.add_column(phase.name, justify="right")
        config, measured, steps = phase.config, phase.measured, phase.steps * phase.config.epochs
        scale = batch * devices / config.reference_batch if config.reference_batch else 1.0
        last = learning_rate_at(1, 1, 0, config.learning_rate, config.minimum_learning_rate)
        gates = f"{gate_learning_rate(config, steps):.3g}" if isinstance(config, SearchConfig) else ""
        values = {
            "epochs": f"{config.epochs}",
            "steps an epoch": f"{phase.steps:,}",
            "steps": f"{steps:,}",
            "images seen": f"{steps * batch * devices:,}",
            "learning rate, peak": f"{scale * config.learning_rate:.3g}",
            "learning rate, end": f"{scale * last:.3g}",
            "gate learning rate": gates,
            "teacher": _teacher_text(config),
            "memory a device": f"{human(measured.memory_bytes(batch))}B",
            "time a step": f"{measured.step_s * batch / measured.batch:.3g} s",
            "time": duration(_epoch_s(phase, images, devices) * config.epochs),
        }
        for name, value in values.items():
            rows.setdefault(name, []).append(value)
    for name, cells in rows.items():
        if any(cells):
            table.add_row(name, *cells)
    return table


def _teacher_text(config: PhaseConfig) -> str:
    if config.distillation == 0:
        return ""
    return f"{config.teacher or 'dense model'}\n({config.distillation_kind}, {config.distillation:g})"


def _print_footer(
    options: CompressCommand, phases: Sequence[PlannedPhase], images: Images, devices: int, console: Console
) -> None:
    total = sum(_epoch_s(phase, images, devices) * phase.config.epochs for phase in phases)
    lines = [f"time in all: {duration(total)}, with the validation after each epoch"]
    if phases:
        measured = phases[0].measured
        on = f"{measured.device} ({torch.get_num_threads()} threads)" if measured.device == "cpu" else measured.device
        reading = max(phase.measured.read_s / phase.measured.batch for phase in phases)
        lines += [
            f"measured here: {measured.steps} steps of {measured.batch} images on {on}, taken times images; reading "
            f"{1000 * reading:.3g} ms an image in one process, shared by {options.images.workers} workers or the cores "
            "of this machine if fewer",
            "memory: bytes of weights, optimizer states and teacher, and what a step holds beside them at its peak "
            "(gradients, activations, images), measured at two batch sizes and carried on to the whole batch; what the "
            "allocator and the libraries take comes on top",
        ]
    scored = options.search.epochs == 0
    left_out = ["scoring"] if scored else []
    left_out += [f"repair from {options.calibration_images:,} images"] if options.repair else []
    left_out += ["the evaluations between phases"]
    lines.append(f"not in the time: {', '.join(left_out)}; fine-tuning is measured with FFNs narrowed evenly")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Return a time in the unit in which it reads best: 8.0 s, 12 min, 4.1 h, 1,465 days."""
    units = (("s", 1, 90), ("min", 60, 5400), ("h", 3600, 172_800), ("days", 86_400, math.inf))
    unit, length = next((unit, length) for unit, length, below in units if seconds < below)
    return f"{seconds / length:,.{1 if seconds < 10 * length else 0}f} {unit}"
