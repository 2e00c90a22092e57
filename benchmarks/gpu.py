"""What spvit does on one GPU: its tests there, a search step, inference, deciding and repairing, one whole run.

python benchmarks/gpu.py --json FILE [--parts tests decide decided search compress inference compiled] [--minutes 8]

Weights and images are random but for the run on scikit-learn's digits, so nothing is downloaded. Every ratio has both
sides, measured in this run. A part that fails is written with its error, and the others go on; after the minutes none
begins.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import spvit
from inference import measure, measure_pruned
from reporting import check_free, machine, spread, write_results

ROOT = Path(__file__).parents[1]
MODELS = ("deit_small_patch16_224", "deit_base_patch16_224")
SEARCH_BATCH, SEARCH_STEPS, WARMUP = 64, 12, 4
BATCHES = [1, 64]
DECIDING = ("deit_small_patch16_224", 1024, "50%")
"""A timm model, random images, and a budget of its MACs."""


def run(*arguments: str) -> tuple[str, float]:
    """Return what a Python command prints, and its seconds. Raises RuntimeError with the end of it when it fails."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} exits with {done.returncode}: {done.stdout[-20000:]}")
    return done.stdout, time.perf_counter() - started


def tests() -> list[dict[str, Any]]:
    """Run the tests marked for accelerators."""
    output, seconds = run("-m", "pytest", "-q", "--tb=line", "-m", "accelerator", "-n", "8", "--dist", "load")
    return [{"tests": output.strip().splitlines()[-1], "seconds": seconds}]


def search() -> list[dict[str, Any]]:
    """Return milliseconds and memory of a search step and of a dense training step, in fp32 and bf16 autocast."""
    rows = []
    for model in MODELS:
        for precision in ("fp32", "bf16"):
            dense, own = (_step(model, precision, searchable) for searchable in (False, True))
            row = {"model": model, "precision": precision, "batch": SEARCH_BATCH, "dense": dense, "search": own}
            row |= {f"{name}_ratio": own[name] / dense[name] for name in ("ms", "bytes")}
            rows.append(row)
    return rows


def _step(model: str, precision: str, searchable: bool) -> dict[str, float]:
    """Return the median and the spread in milliseconds of a training step at batch 64, and its peak memory."""
    torch.manual_seed(0)
    images = torch.randn(SEARCH_BATCH, 3, 224, 224, device="cuda")
    targets = torch.randint(0, 1000, (SEARCH_BATCH,), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    net: nn.Module = timm.create_model(model).cuda()
    if searchable:
        net = spvit.make_searchable(net, inplace=True)
    budget = spvit.BudgetLoss(net, macs="50%") if searchable else None
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)
    net.train()
    times = []
    for _ in range(WARMUP + SEARCH_STEPS):
        started = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            loss = nn.functional.cross_entropy(net(images), targets)
        if budget is not None:
            loss = loss + budget()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    median, width = spread(times[WARMUP:])
    return {"ms": median, "spread_ms": width, "bytes": torch.cuda.max_memory_allocated() - before}


def inference(compiled: bool = False) -> list[dict[str, Any]]:
    """Return latencies of the published DeiT-S and DeiT-B against dense, eager; or compiled, in bf16 alone."""
    names = [name for name in spvit.architectures() if any(size in name for size in ("deit_small", "deit_base"))]
    dtypes = ["bf16"] if compiled else ["fp32", "bf16"]
    return [row for name in names for row in measure(name, BATCHES, dtypes, 0.5, device="cuda", compiled=compiled)]


def decide() -> list[dict[str, Any]]:
    """Return the seconds and the memory of scoring, deciding and repairing."""
    model, count, budget = DECIDING
    host, images = timm.create_model(model).cuda().eval(), torch.randn(count, 3, 224, 224)
    row: dict[str, Any] = {"model": model, "images": count, "macs": budget}
    torch.cuda.reset_peak_memory_stats()
    started = [time.perf_counter()]

    def passed(name: str) -> None:
        torch.cuda.synchronize()
        started.append(time.perf_counter())
        row[f"{name}_s"] = started[-1] - started[-2]

    scores = spvit.score(host, images)
    passed("score")
    architecture = spvit.decide(host, macs=budget, scores=scores)
    passed("decide")
    spvit.prune(host, architecture, repair=images)
    passed("repair")
    row["peak_bytes"] = torch.cuda.max_memory_allocated()
    return [row]


def decided() -> list[dict[str, Any]]:
    """Return latencies of DeiT-S as `decide` makes it at half and a quarter of the MACs, eager and in bf16 compiled."""
    model, _, _ = DECIDING
    host, images = timm.create_model(model).cuda().eval(), torch.randn(256, 3, 224, 224)
    scores = spvit.score(host, images)
    chosen = {budget: spvit.decide(host, macs=budget, scores=scores) for budget in ("50%", "25%")}
    rows = []
    for compiled, dtypes in ((False, ["fp32", "bf16"]), (True, ["bf16"])):
        for budget, architecture in chosen.items():
            what = f"{model} {budget}", host, architecture, BATCHES, dtypes, 0.5
            rows += measure_pruned(*what, device="cuda", compiled=compiled)
    return rows


def compress() -> list[dict[str, Any]]:
    """Run the demo, which trains a small ViT on digits and compresses it, and return the end of what it prints."""
    with tempfile.TemporaryDirectory() as folder:
        output, seconds = run("-m", "spvit_command", "demo", "--output", str(Path(folder) / "demo"))
    return [{"demo": output.strip().splitlines()[-12:], "seconds": seconds}]


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "tests": tests,
    "decide": decide,
    "decided": decided,
    "search": search,
    "compress": compress,
    "inference": inference,
    "compiled": partial(inference, compiled=True),
}


def show(console: Console, part: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows of a part as a table of their figures."""
    flat = [
        {
            key: value
            for name, own in row.items()
            for key, value in (
                {f"{name} {k}": v for k, v in own.items()} if isinstance(own, dict) else {name: own}
            ).items()
        }
        for row in rows
    ]
    skipped = ("batch", "device", "dtype", "threads", "repeats", "images_per_s")
    columns = [name for name in flat[0] if not (" " in name and name.split()[-1] in skipped)] if flat else []
    table = Table(title=part)
    for name in columns:
        table.add_column(name)
    for row in flat:
        cells = (row.get(name, "") for name in columns)
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
    console.print(table)


def main() -> None:
    """Run the parts, print each, and write all that there is after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no part begins (default: %(default)s)")
    parser.add_argument("--json", required=True, help="file to write the figures to")
    options = parser.parse_args()
    check_free(options.json)
    if not torch.cuda.is_available():
        sys.exit("no CUDA device is at hand; the other benchmarks measure on the CPU")
    console, started = Console(width=160), time.perf_counter()
    console.print(machine())
    found: list[dict[str, Any]] = []
    for part in options.parts:
        if time.perf_counter() - started > 60 * options.minutes:
            found.append({"part": part, "error": f"left out, as {options.minutes:g} minutes had passed"})
            continue
        try:
            rows = PARTS[part]()
            show(console, part, rows)
            found += [{"part": part, **row} for row in rows]
        except Exception as error:  # whatever fails, the other parts are worth their time
            console.print(f"{part} failed: {error}", markup=False)
            found.append({"part": part, "error": f"{type(error).__name__}: {error}"})
        torch.cuda.empty_cache()
        write_results(options.json, "gpu", found, anew=True)
    console.print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
