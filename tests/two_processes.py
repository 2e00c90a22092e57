"""What each of two processes does in one launch, for tests/train/test_processes.py: they write what they found.

    torchrun --nproc_per_node 2 two_processes.py FOLDER
torchrun --nproc_per_node 2 two_processes.py raises|killed WORDS...     the command; the second process fails
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Subset

from spvit.checkpoint import Preprocessing, plain_state
from spvit.cli.main import main as command
from spvit.errors import RunError, RunStoppedError
from spvit.search.budget_loss import BudgetLoss
from spvit.search.gates import GateDraws
from spvit.search.network import make_searchable
from spvit.train.data import load_images
from spvit.train.figures import figures_of, reference_of
from spvit.train.loop import Loop, Phase, run_phase
from spvit.train.processes import processes
from spvit.train.settings import ImageConfig, LoopConfig
from spvit.train.shards import local
from training import digits, micro_host, run_in, short, short_search, states_equal

RANDOM = {"batch_size": 64, "mixup": 0.2, "random_erasing": 0.2, "color_jitter": 0.2}
PLAIN = {"flip": 0.0, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}  # a view is the image
COUNTED = 353  # images to validate on, not alike in number for two processes


def halved(folder: Path, batch_size: int, accumulate: int = 1) -> dict[str, Any]:
    """Train where nothing is drawn but the images' order, and return the figures; the first process writes weights."""
    model, images = micro_host(), digits(batch_size=batch_size, accumulate=accumulate, **PLAIN)
    images = replace(images, validation=Subset(images.validation, range(COUNTED)))
    name = f"halved{accumulate}"
    (folder / name).mkdir(exist_ok=True)
    figures = run_phase(Phase("dense", model, short(1)), run_in(folder / name, images))
    if processes().is_main_process:
        save_file(plain_state(model), folder / f"{name}.safetensors")
    return vars(figures)


@contextmanager
def signals(stops: dict[int, tuple[int, int]]) -> Iterator[None]:
    """Send signals at some steps of training inside the context, each to the processes from one on."""
    rank, step, stopped = processes().process_index, Loop.step, list(stops)

    def signalled(loop: Loop, batches: Any, index: int) -> dict[str, Tensor]:
        if index in stopped:
            number, last = stops[stopped.pop(stopped.index(index))]
            if rank >= last:
                os.kill(os.getpid(), number)
        return step(loop, batches, index)

    Loop.step = signalled  # type: ignore[method-assign]
    try:
        yield
    finally:
        Loop.step = step  # type: ignore[method-assign]


def searched(folder: Path, stops: dict[int, tuple[int, int]], draws: list[Any], workers: int = 0) -> torch.nn.Module:
    """Return a network searched with signals at some steps, each to some processes, and continued after them.

    draws: gets the noise of the gates of the first step.
    """
    draw = GateDraws._draw

    def drawn(gates: GateDraws) -> None:
        draw(gates)
        draws.append(torch.cat(list(gates._noise.values())).tolist())

    GateDraws._draw = drawn  # type: ignore[method-assign]
    (folder).mkdir(exist_ok=True)
    try:
        with signals(stops):
            while True:
                net = make_searchable(micro_host())
                phase = Phase("search", net, short_search(2, averaging_epochs=0.5), BudgetLoss(net, macs="60%"))
                with suppress(RunStoppedError):
                    run_phase(phase, run_in(folder, digits(**RANDOM, workers=workers), log_every=4))
                    return net
                torch.manual_seed(99 + processes().process_index)  # what happened before must not matter
    finally:
        GateDraws._draw = draw  # type: ignore[method-assign]


def taught(
    folder: Path,
    shards: tuple[bool, ...],
    stops: dict[int, tuple[int, int]] | None = None,
    labels: bool = True,
    held: set[Any] | None = None,
    **images: Any,
) -> dict[str, Tensor]:
    """Return weights after two epochs of four steps; signals end all parts of the run but the last.

    shards: whether each part of the run is sharded, as long as the run goes on.
    held: gets what share of the weights, of their average and of the moments this process holds after steps.
    """
    step = Loop.step

    def weighed(loop: Loop, batches: Any, index: int) -> dict[str, Tensor]:
        losses, parts = step(loop, batches, index), [*loop.phase.model.parameters(), *loop.kept.parameters()]
        parts += [value for state in loop.optimizer.state.values() for value in state.values() if value.dim()]
        if held is not None:
            held.add(round(sum(local(part).numel() for part in parts) / sum(part.numel() for part in parts), 2))
        return losses

    run = run_in(folder, digits(**images), log_every=2, compile=shards[0] and not labels)
    whole: Any = run.images
    run = replace(run, images=replace(whole, train=Subset(whole.train, range(512))))
    run = replace(run, images=replace(run.images, validation=Subset(whole.validation, range(65))))
    teacher, settings = micro_host(seed=1), {"averaging_epochs": 0.5, "layer_decay": 0.7, "clip_gradient": 0.3}
    if not labels:
        run = replace(run, images=replace(run.images, classes=()))
        run = replace(run, reference=reference_of(teacher, run.images, run.config, "features"))
    folder.mkdir(exist_ok=True)
    Loop.step = weighed  # type: ignore[method-assign]
    try:
        with signals(stops or {}):
            for shard in shards:
                model = micro_host()
                model.pos_embed.requires_grad_(False)
                config = short(2, **settings, keep_best=True, distillation=0.5)
                phase = Phase("dense", model, config, teacher=teacher)
                with suppress(RunStoppedError):
                    run_phase(phase, replace(run, config=replace(run.config, shard=shard)))
    finally:
        Loop.step = step  # type: ignore[method-assign]
    return plain_state(model)


def main(folder: Path) -> None:
    """Run all cases and write what this process found."""
    rank, draws = processes().process_index, []  # type: ignore[var-annotated]
    found: dict[str, Any] = {"halved": halved(folder, 64), "quartered": halved(folder, 32, accumulate=2)}
    whole = searched(folder / "whole", {}, draws)
    stops = {3: (signal.SIGTERM, 1), 15: (signal.SIGUSR1, 0)}  # to the second process; to both
    found["continued"] = states_equal(searched(folder / "cut", stops, [], workers=1), whole)
    found["draws"] = draws[0]
    torch.compile = partial(torch.compile, backend="eager")  # type: ignore[assignment]
    held: set[float] = set()
    summed = {"batch_size": 32, "accumulate": 2, **PLAIN}
    models = {
        "summed": taught(folder / "summed", (True,), held=held, **summed),
        "turns": taught(folder / "turns", (True, False, True), {1: stops[3], 5: stops[15]}, batch_size=64, **PLAIN),
        "features": taught(folder / "features", (True,), labels=False, batch_size=64, **PLAIN),
    }
    taught(folder / "left", (True,), {1: stops[3]}, batch_size=64, **PLAIN)
    whole_shards = taught(folder / "whole_shards", (True,), **RANDOM)
    cut_shards = taught(folder / "cut_shards", (True, True), {5: stops[15]}, **RANDOM)
    found["shards"] = [*held], all(torch.equal(value, cut_shards[name]) for name, value in whole_shards.items())
    if rank == 0:
        for name, tensors in models.items():
            save_file(tensors, folder / f"{name}.safetensors")
    pictures = ImageConfig(batch_size=4, skip_corrupt=True)
    images = load_images(str(folder / "pictures"), pictures, (3, 8, 8), Preprocessing())
    found["read"] = figures_of([micro_host(in_chans=3, num_classes=2)], images, LoopConfig())[0].images
    (folder / f"{rank}.json").write_text(json.dumps(found))
    processes().destroy_process_group()


def failing(how: str, words: list[str]) -> int:
    """Run a command, in which the second process fails in its third step of training."""
    step, calls = Loop.step, []  # type: ignore[var-annotated]

    def fails(loop: Loop, *given: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3 and processes().process_index == 1:
            if how == "raises":
                raise RunError("one of two fails")
            os.kill(os.getpid(), signal.SIGKILL)
        return step(loop, *given)

    Loop.step = fails  # type: ignore[method-assign]
    return command(words)


if __name__ == "__main__":
    if sys.argv[1] in ("raises", "killed"):
        sys.exit(failing(sys.argv[1], sys.argv[2:]))
    main(Path(sys.argv[1]))
