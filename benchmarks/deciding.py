"""What scoring, deciding and repairing take: seconds and peak memory, beside a training step's memory.

python benchmarks/deciding.py [--model deit_tiny_patch16_224] [--images 1024] [--size 224] [--macs 50%] [--json FILE]

Weights and images are random, as time and memory do not depend on them. Memory is the peak resident size of a process,
and what it had been before the calls or the training began, with the images in place. The training step is forward,
cross entropy, backward and AdamW, at batch size 64. CPU seconds are those of all threads: where they are much fewer
than seconds x threads, other jobs had the processor.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table

import spvit
from reporting import check_free, figures_of_process, machine, peak_bytes, write_results

SIDES = ("score, decide, repair", "training")
STEPS = ("score", "decide", "repair")
TRAINING_BATCH = 64
TRAINING_STEPS = 2


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return what a call returns, the seconds that it took, and those of all its threads."""
    started, busy = time.perf_counter(), time.process_time()
    result = run()
    return result, time.perf_counter() - started, time.process_time() - busy


def compress(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of each step and the memory of all, measured in this process."""
    host, images = timm.create_model(options.model, img_size=options.size), random_images(options, options.images)
    before = peak_bytes()
    scored = timed(lambda: spvit.score(host, images))
    decided = timed(lambda: spvit.decide(host, macs=options.macs, scores=scored[0]))
    repaired = timed(lambda: spvit.prune(host, decided[0], repair=images))
    figures: dict[str, Any] = {"bytes_before": before, "peak_bytes": peak_bytes(), "kinds": decided[0].kinds()}
    for name, (_, seconds, cpu_seconds) in zip(STEPS, (scored, decided, repaired)):
        figures |= {f"{name}_seconds": seconds, f"{name}_cpu_seconds": cpu_seconds}
    return figures


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Return the memory of training steps of the dense model, measured in this process."""
    host, images = timm.create_model(options.model, img_size=options.size), random_images(options, TRAINING_BATCH)
    before = peak_bytes()
    targets = torch.randint(0, host.num_classes, (TRAINING_BATCH,))
    optimizer = torch.optim.AdamW(host.parameters())
    for _ in range(TRAINING_STEPS):
        torch.nn.functional.cross_entropy(host.train()(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"bytes_before": before, "peak_bytes": peak_bytes()}


def random_images(options: argparse.Namespace, count: int) -> torch.Tensor:
    """Return [count, 3, size, size]."""
    return torch.randn(count, 3, options.size, options.size)


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    """Return the two sides as a table."""
    table = Table(title=title)
    for name in ("side", *(column for step in STEPS for column in (f"{step} s", "CPU s")), "GB before", "GB peak"):
        table.add_column(name, justify="left" if name == "side" else "right")
    for row in rows:
        names = [f"{step}_{unit}" for step in STEPS for unit in ("seconds", "cpu_seconds")]
        seconds = [f"{row[name]:.1f}" if name in row else "" for name in names]
        table.add_row(row["side"], *seconds, *(f"{row[name] / 1e9:.2f}" for name in ("bytes_before", "peak_bytes")))
    return table


def parse_options() -> argparse.Namespace:
    """Return the command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="a timm model (default: %(default)s)")
    parser.add_argument("--images", type=int, default=1024, help="calibration images (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="pixels of their sides (default: %(default)s)")
    parser.add_argument("--macs", default="50%", help="the budget (default: half)")
    parser.add_argument("--json", help="file to write the rows to")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure each side in a process of its own, print both, and write them."""
    options = parse_options()
    torch.manual_seed(0)
    if options.side:
        print(json.dumps((compress if options.side == SIDES[0] else train)(options)))
        return
    check_free(options.json)
    settings = {name: str(getattr(options, name)) for name in ("model", "images", "size", "macs")}
    arguments = [__file__, *(part for name, value in settings.items() for part in (f"--{name}", value))]
    rows = [{"side": side, **figures_of_process([*arguments, "--side", side], {})} for side in SIDES]
    title = f"{options.model}, {options.size} px, {options.images} images, {options.macs} MACs, fp32"
    Console(width=120).print(table_of(rows, f"{title}, {machine()['threads']} threads"))
    write_results(options.json, "deciding", rows, settings=settings)


if __name__ == "__main__":
    main()
