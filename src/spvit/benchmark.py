"""Latency of a model: a measurement on this machine, never part of its cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Latency:
    """The time of one forward pass, with what it was measured on."""

    latency_ms: float
    """Median over the repeats, in milliseconds for the whole batch."""
    spread_ms: float
    """Interquartile range over the repeats."""
    images_per_s: float
    batch: int
    device: str
    dtype: str
    threads: int
    repeats: int


@torch.inference_mode()
def measure_latencies(models: Sequence[nn.Module], images: Tensor, seconds: float = 1.0) -> list[Latency]:
    """Return the latency of several models on the same images, measured in turns so that drift hits all alike.

    The models are in evaluation mode, on the device of the images [B, channels, height, width]; `seconds` is for each.
    """
    from torch.utils.benchmark import Timer  # logs about CUDA when imported, which only a measurement should pay for

    threads = torch.get_num_threads()
    timers = [
        Timer("model(images)", globals={"model": model, "images": images}, num_threads=threads) for model in models
    ]
    once = max(timer.timeit(2).median for timer in timers)
    runs = max(1, int(0.05 / once))
    rounds = range(max(3, int(seconds / (once * runs))))
    times = torch.tensor([[timer.timeit(runs).median * 1000 for timer in timers] for _ in rounds])
    quartiles = times.quantile(torch.tensor([0.25, 0.5, 0.75]), dim=0).T.tolist()
    return [
        Latency(
            latency_ms=median,
            spread_ms=high - low,
            images_per_s=len(images) * 1000 / median,
            batch=len(images),
            device=images.device.type,
            dtype=str(images.dtype).removeprefix("torch."),
            threads=threads,
            repeats=len(times),
        )
        for low, median, high in quartiles
    ]
