"""A few steps of a phase as it would be trained: their time and memory, from which a whole run is foreseen.

Memory is counted in the bytes of tensors, in the same way on every device: what stays (weights, optimizer states,
teacher), and what a step holds beside that at its peak, on two batch sizes, since it grows by the image.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spvit.hosts.host import logits_of
from spvit.train.data import Images
from spvit.train.loaders import training_loader
from spvit.train.loop import Loop, Phase
from spvit.train.progress import PhaseProgress
from spvit.train.settings import LoopConfig

BATCH_ON_CPU = 8
DRAWN_BATCHES = 3
TIMED_STEPS = 3
SECONDS = 20.0  # no further step is timed after these


@dataclass(frozen=True)
class Rehearsal:
    """What a few steps of a phase took on this machine, on one of its devices."""

    batch: int
    """Images a step."""
    steps: int
    """Steps that were timed, after three that were not."""
    device: str
    step_s: float
    """Median seconds of a step: forward, backward, optimizers, teacher."""
    read_s: float
    """Median seconds in which one process reads and augments a batch."""
    evaluation_s: float
    """Seconds of a batch in evaluation."""
    staying_bytes: int
    """Weights, statistics, optimizer states, moving average, teacher."""
    peak_bytes: int
    """What a step holds beside them at its peak: gradients, activations, images."""
    image_bytes: float
    """How much that grows by an image."""

    def memory_bytes(self, batch: int) -> int:
        """Return the bytes that a device needs at a batch of so many images."""
        return round(self.staying_bytes + self.peak_bytes + self.image_bytes * (batch - self.batch))

    def epoch_s(self, train_images: int, validation_images: int, workers: int) -> float:
        """Return the seconds of an epoch on one device that trains and validates on so many images.

        With workers, images are read while the device works, by at most one worker a core of this machine.
        """
        readers = min(workers, os.cpu_count() or 1)
        total = 0.0
        for images, working in ((train_images, self.step_s), (validation_images, self.evaluation_s)):
            batch = max(working, self.read_s / readers) if readers else working + self.read_s
            total += batch * images / self.batch
        return total


class TensorPeak(TorchDispatchMode):
    """Counts the bytes of tensors made while it is on and still alive; storages that it knows beforehand are free."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._alive = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._now = self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, count = storage.data_ptr(), storage.nbytes()
        if count == 0 or address in self._alive:
            return
        self._alive.add(address)
        self._now += count
        self.peak_bytes = max(self.peak_bytes, self._now)
        weakref.finalize(storage, self._release, address, count)

    def _release(self, address: int, count: int) -> None:
        self._alive.discard(address)
        self._now -= count


def rehearse(phase: Phase, images: Images, config: LoopConfig) -> Rehearsal:
    """Return what a few steps of a phase take here: of a small batch on a CPU, of the whole batch elsewhere.

    The phase's model is trained by these steps; nothing is written.

    Args:
        phase: what would be trained.
        images: what on.
        config: settings of the run.
    """
    whole = images.config.batch_size
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    batch = min(whole, BATCH_ON_CPU) if on_cpu else whole
    # One process reads, so that the time of reading is that of one.
    small = replace(images, config=replace(images.config, batch_size=batch, workers=0))
    loop = Loop(phase, small, Path(os.devnull), config, PhaseProgress(None))
    device = loop.accelerator.device
    loader = iter(training_loader(small))
    drawn, reading = [], []
    for _ in range(min(DRAWN_BATCHES, len(loader))):
        seconds, found = _timed(lambda: next(loader), device)
        reading.append(seconds)
        drawn.append(send_to_device(found, device))
    loop.model.train()

    def step(size: int = batch) -> None:
        pictures, targets = next(batches)
        loop.step(pictures[:size].clone(), targets[:size], 0, 0, 0.0)

    batches = cycle(drawn)
    half = max(1, batch // 2)
    step(half)  # makes the optimizers' states, which stay
    peaks = []
    for size in (half, batch):
        with TensorPeak(_staying(loop)) as counter:
            step(size)
        peaks.append(counter.peak_bytes)
    working: list[float] = []
    while len(working) < TIMED_STEPS and (sum(working) < SECONDS or not working):
        working.append(_timed(step, device)[0])
    loop.model.eval()
    with torch.no_grad():
        evaluation = min(_timed(lambda: logits_of(loop.model(drawn[0][0])), device)[0] for _ in range(2))
    staying = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _staying(loop)}
    loop.accelerator.free_memory()
    return Rehearsal(
        batch=batch,
        steps=len(working),
        device=device.type,
        step_s=median(working),
        read_s=median(reading),
        evaluation_s=evaluation,
        staying_bytes=sum(staying.values()),
        peak_bytes=peaks[1],
        image_bytes=(peaks[1] - peaks[0]) / (batch - half) if batch > half else 0.0,
    )


def _timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    started = time.perf_counter()
    result = run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started, result


def _staying(loop: Loop) -> list[Tensor]:
    """Return what a phase keeps on the device from step to step."""
    modules = [loop.model, loop.teacher, loop.average]
    tensors = [tensor for module in modules if module is not None for tensor in module.state_dict().values()]
    for optimizer in (loop.weights, loop.gates):
        if optimizer is not None:
            tensors += [value for state in optimizer.state.values() for value in state.values()]
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)]
