"""What each of two processes does in one launch, for tests/train/test_processes.py: they write what they found.

    torchrun --nproc_per_node 2 two_processes.py FOLDER
torchrun --nproc_per_node 2 two_processes.py raises|killed WORDS...     the command; the second process fails
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from dataclasses import replace
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
from spvit.train.figures import figures_of
from spvit.train.loop import Loop, Phase, run_phase
from spvit.train.processes import processes
from spvit.train.settings import ImageConfig, LoopConfig
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


def searched(folder: Path, stops: dict[int, tuple[int, int]], draws: list[Any], workers: int = 0) -> torch.nn.Module:
    """Return a network searched with signals at some steps, each to some processes, and continued after them.

    draws: gets the noise of the gates of the first step.
    """
    rank, step, draw = processes().process_index, Loop.step, GateDraws._draw
    stopped = list(stops)

    def signalled(loop: Loop, batches: Any, index: int) -> dict[str, Tensor]:
        if index in stopped:
            number, last = stops[stopped.pop(stopped.index(index))]
            if rank >= last:
                os.kill(os.getpid(), number)
        return step(loop, batches, index)

    def drawn(gates: GateDraws) -> None:
        draw(gates)
        draws.append(torch.cat(list(gates._noise.values())).tolist())

    Loop.step, GateDraws._draw = signalled, drawn  # type: ignore[method-assign]
    (folder).mkdir(exist_ok=True)
    try:
        while True:
            net = make_searchable(micro_host())
            phase = Phase("search", net, short_search(2, averaging_epochs=0.5), BudgetLoss(net, macs="60%"))
            with suppress(RunStoppedError):
                run_phase(phase, run_in(folder, digits(**RANDOM, workers=workers), log_every=4))
                return net
            torch.manual_seed(99 + rank)  # what happened before must not matter
    finally:
        Loop.step, GateDraws._draw = step, draw  # type: ignore[method-assign]


def main(folder: Path) -> None:
    """Run all cases and write what this process found."""
    rank, draws = processes().process_index, []  # type: ignore[var-annotated]
    found: dict[str, Any] = {"halved": halved(folder, 64), "quartered": halved(folder, 32, accumulate=2)}
    whole = searched(folder / "whole", {}, draws)
    stops = {3: (signal.SIGTERM, 1), 15: (signal.SIGUSR1, 0)}  # to the second process; to both
    found["continued"] = states_equal(searched(folder / "cut", stops, [], workers=1), whole)
    found["draws"] = draws[0]
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
