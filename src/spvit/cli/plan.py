"""`spvit compress --dry-run`: what a run will do, and its time and memory, from a few steps on this machine."""

import copy
import logging
import os
import time
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import Subset

from spvit.budget import human
from spvit.cli.inputs import model_and_images
from spvit.cli.options import CompressCommand
from spvit.cli.show import say
from spvit.errors import RunFolderError
from spvit.hosts.host import Host
from spvit.replacements.costs import network_costs
from spvit.train.compress import check_compress, search_phase
from spvit.train.data import training_loader
from spvit.train.figures import reference_of
from spvit.train.loop import Loop, Phase, Run
from spvit.train.optimizers import groups_of, tensors_of
from spvit.train.run_folder import DENSE, FINETUNE, RunFolder
from spvit.train.settings import ImageConfig
from spvit.train.sources import find_images

IMAGENET_TRAIN, IMAGENET_VALIDATION, IMAGENET_CLASSES = 1_281_167, 50_000, 1000
STEPS, BATCH_ON_CPU, FEW = 3, 8, 16


def print_plan(options: CompressCommand, console: Console) -> None:
    """Print the phases, costs, memory and time of a run; write nothing. Raises what the run itself would raise."""
    if options.resume:
        raise RunFolderError("--dry-run plans a new run from its start; leave out --resume")
    RunFolder.open(options.output)
    opened, images = model_and_images(
        options, options.dense.epochs > 0, weights=False, find=_found_or_noise, unlabelled=True
    )
    host, costs = opened.model, network_costs(opened.model)
    run = Run(images, RunFolder(os.devnull), replace(options, compile=False, shard=False))
    if not images.classes:
        few = replace(images, validation=Subset(images.validation, range(min(FEW, len(images.validation)))))  # type: ignore[arg-type]
        run = replace(run, reference=reference_of(host, few, options, options.objective))
    budget = options.budget()
    limits = check_compress(host, budget, options, run, weights=False)
    [(budgeted, target)] = limits.items()
    share = budget.fraction or 1.0 if budgeted == "latency" else target / costs[budgeted].dense
    phases = [
        Phase(DENSE, copy.deepcopy(host), options.dense),
        *([search_phase(host, limits, options.search)] if options.search.epochs > 0 else []),
        Phase(FINETUNE, copy.deepcopy(host), options.finetuning, teacher=host),
    ]
    planned = {phase.name: _planned(phase, run, share) for phase in phases if phase.config.epochs > 0}
    say(console, f"plan of spvit compress to {options.output}; nothing is written", f"model: {options.model}")
    if options.given():
        say(console, f"constraints: {'; '.join(options.given().values())}")
    if budgeted == "latency":
        say(console, f"latency: {target} asked, measured at the start of the run; below, MACs as if of the same share")
    for metric, cost in costs.items():
        after = f"{'' if metric == budgeted else 'about '}{human(share * cost.dense)} ({share:.1%}) after"
        say(console, f"{metric}: {human(cost.dense)} before, {after}")
    if options.repair:
        views, first = options.repair_views * options.calibration_images, Host.of(host).blocks[0].attention
        needed = human(4 * views * 2 * first.tokens * first.dim)
        say(console, f"repair: {views:,} views of training images, whose tokens take {needed}B of memory")
    table = Table("", *planned, title="phases", title_justify="left")
    for row in next(iter(planned.values()), {}):
        table.add_row(row, *(column[row] for column in planned.values()))
    console.print(table)
    say(console, f"time: {STEPS} steps of each phase here; evaluation a third, fine-tuning times the budget's share")
    say(console, "memory: weights, gradients, optimizer, teacher, backward pass; not in the time: scoring and repair")


def _planned(phase: Phase, run: Run, share: float) -> dict[str, str]:
    """Return a phase's column of the table. A few steps on small batches, which are measured, train its model."""
    loop, images = Loop(phase, run), run.images
    accumulate, loop.accumulate = loop.accumulate, 1
    whole, workers, config = images.config.batch_size, images.config.workers, phase.config
    batch = whole if torch.accelerator.is_available() else min(whole, BATCH_ON_CPU)
    modules = [module.state_dict() for module in (loop.model, loop.loss.teacher, loop.average) if module is not None]
    kept = {tensor.untyped_storage().data_ptr(): tensor.nbytes for module in modules for tensor in module.values()}
    needed: dict[int, int] = {}  # bytes that the backward pass needs, by storage

    def keep(tensor: Tensor) -> Tensor:
        needed[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    device, started = loop.accelerator.device, time.perf_counter()
    loop.model.train()
    small = replace(images, config=replace(images.config, batch_size=batch, workers=0))
    for pictures, targets in islice(training_loader(small), STEPS):  # the last one counts
        read_s, started = time.perf_counter() - started, time.perf_counter()
        needed.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = loop.step([(pictures.to(device), targets.to(device))], 0)
        losses["loss"].item()  # waits for the device
        step_s, started = time.perf_counter() - started, time.perf_counter()
    moments = tensors_of(loop.optimizer).values()
    gradients = [parameter for parameter in loop.model.parameters() if parameter.requires_grad]
    activations = sum(count for storage, count in needed.items() if storage not in kept) / batch * whole
    memory = sum(kept.values()) + sum(tensor.nbytes for tensor in (*moments, *gradients)) + activations
    image_s = (max(step_s, read_s / workers) if workers else step_s + read_s) / batch
    seconds = config.epochs * whole * image_s * (len(loop.train) + len(loop.validation) / 3)
    return {
        "images": f"{len(images.train):,}",  # type: ignore[arg-type]
        "images a step": f"{loop.batch}{f', {accumulate} batches' if accumulate > 1 else ''}",
        "epochs": f"{config.epochs}",
        "steps an epoch": f"{loop.steps:,}",
        "steps": f"{loop.total:,}",
        "learning rate, peak": f"{loop.scale * loop.rates[1]:.3g}",
        "learning rate, end": f"{loop.scale * min(loop.rates[1:]):.3g}",
        "gate learning rate": ", ".join(f"{group['lr']:.3g}" for group in groups_of(loop.optimizer, True)),
        "teacher": "" if loop.loss.teacher is None else config.teacher or "dense model",
        "memory a device": f"{human(memory)}B",
        "time": str(timedelta(seconds=round(seconds * share if phase.name == FINETUNE else seconds))),
    }


def _found_or_noise(source: str, config: ImageConfig) -> Any:
    """Return what `find_images` does; for a folder imagenet that does not exist, as many pictures of noise."""
    if Path(source).name.lower() != "imagenet" or Path(source).exists():
        return find_images(source, config)
    logging.getLogger("spvit").warning("%s is not there; noise stands for its pictures", source)
    noise = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    items = [(noise, index % IMAGENET_CLASSES) for index in range(IMAGENET_TRAIN)]
    return items, items[:IMAGENET_VALIDATION], tuple(str(index) for index in range(IMAGENET_CLASSES))
