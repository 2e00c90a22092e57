"""The search step against a dense training step: time and peak memory, each in processes of its own, in turns.

python benchmarks/search_step.py [--models deit_tiny_patch16_224 deit_small_patch16_224] [--json FILE]

A step is forward, cross entropy (and budget loss), backward, AdamW. Memory is the process's peak resident size less
what it held before the model was built, twice: as the C library's allocator comes, where the holes that short-lived
tensors leave count too, and with MALLOC_MMAP_THRESHOLD_=262144, where every large tensor is given back at once and the
peak is what the step needs. Gates are `fresh` (as made), or `half`: every second block's attention decided against
(conv3, conv1 and skip in turn) and half of the FFN units closed.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table

import spvit
from reporting import check_free, figures_of_process, machine, peak_bytes, spread, write_results
from spvit.search.network import gated_layers

SIDES = ("dense", "fresh", "half")
MEMORY_STEPS = 3
FIGURES = ("seconds", "bytes", "needed_bytes")


def half_close(net: torch.nn.Module) -> None:
    """Close half of a searchable network's gates surely and open the others surely."""
    patterns = [(1.0, 1.0, -1.0), (1.0, -1.0, 1.0), (-1.0, 1.0, 1.0)]
    with torch.no_grad():
        for index, (attention, ffn) in enumerate(gated_layers(net)):
            closed = patterns[index // 2 % 3] if index % 2 else (1.0, 1.0, 1.0)
            attention.gate_logits.copy_(8 * torch.tensor(closed))
            ffn.gate_logits.fill_(8.0)[::2] = -8.0


def run_side(side: str, model: str, batch: int, steps: int) -> dict[str, float]:
    """Return the median seconds of a step and the peak memory in bytes of one side, measured in this process.

    Args:
        side: of SIDES.
        model: timm's name.
        batch: images a step.
        steps: of which the first two are not counted.
    """
    torch.manual_seed(0)
    images, targets = torch.randn(batch, 3, 224, 224), torch.randint(0, 1000, (batch,))
    before = peak_bytes()
    net: torch.nn.Module = timm.create_model(model)
    budget = None
    gates: list[torch.nn.Parameter] = []
    if side != "dense":
        net = spvit.make_searchable(net, inplace=True)
        if side == "half":
            half_close(net)
        gates = spvit.gate_parameters(net)
        budget = spvit.BudgetLoss(net, macs="50%")
    held = {id(gate) for gate in gates}
    optimizers = [torch.optim.AdamW([p for p in net.parameters() if id(p) not in held], lr=1e-5)]
    if gates:
        # Learning rate zero: the gates must stand where they are throughout the measurement.
        optimizers.append(torch.optim.AdamW(gates, lr=0.0, weight_decay=0.0))
    net.train()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        loss = torch.nn.functional.cross_entropy(net(images), targets)
        if budget is not None:
            loss = loss + budget()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return {"seconds": spread(seconds[2:])[0], "bytes": peak_bytes() - before}


def measure(side: str, model: str, batch: int, steps: int) -> dict[str, float]:
    """Return the seconds and bytes of `run_side` from a process of its own, and `needed_bytes` from a second one."""
    arguments = [__file__, "--side", side, "--models", model, "--batch", str(batch), "--steps"]
    figures = figures_of_process([*arguments, str(steps)], {})
    needed = figures_of_process([*arguments, str(MEMORY_STEPS)], {"MALLOC_MMAP_THRESHOLD_": "262144"})
    return {**figures, "needed_bytes": needed["bytes"]}


def main() -> None:
    """Measure all sides in turns, print both sides of every ratio, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["deit_tiny_patch16_224", "deit_small_patch16_224"])
    parser.add_argument("--batch", type=int, default=16, help="images a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="steps a process, the first two not counted")
    parser.add_argument("--repeats", type=int, default=5, help="processes a side (default: %(default)s)")
    parser.add_argument("--json", help="file to write the rows to")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_side(options.side, options.models[0], options.batch, options.steps)))
        return
    check_free(options.json)
    console = Console(width=120)
    rows: list[dict[str, Any]] = []
    for model in options.models:
        figures: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(options.repeats):
            for side in SIDES:
                figures[side].append(measure(side, model, options.batch, options.steps))
        rows += _rows(model, options.batch, figures)
    table = Table(title=f"search step, batch {options.batch}, 224 px, fp32, {machine()['threads']} threads")
    for name in ("model", "side", "s/step", "spread", "ratio", "MB", "ratio", "MB needed", "ratio"):
        table.add_column(name, justify="left" if name in ("model", "side") else "right")
    for row in rows:
        cells = [
            row["model"].removesuffix("_patch16_224"),
            row["side"],
            f"{row['seconds']:.3f}",
            f"{row['seconds_spread']:.3f}",
        ]
        cells.append(f"{row['seconds_ratio']:.3f}")
        for name in ("bytes", "needed_bytes"):
            cells += [f"{row[name] / 1e6:.0f}", f"{row[f'{name}_ratio']:.3f}"]
        table.add_row(*cells)
    console.print(table)
    write_results(options.json, "search_step", rows)


def _rows(model: str, batch: int, figures: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    rows = []
    for side, runs in figures.items():
        row: dict[str, Any] = {"model": model, "side": side, "batch": batch, "repeats": len(runs)}
        for name in FIGURES:
            row[name], row[f"{name}_spread"] = spread([run[name] for run in runs])
            row[f"{name}_ratio"] = row[name] / spread([run[name] for run in figures["dense"]])[0]
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
