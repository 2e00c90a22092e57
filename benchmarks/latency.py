"""Whether a latency budget lands on what was asked, and what a budget of the same share of MACs gives.

python benchmarks/latency.py --images FOLDER [--model NAME] [--weights FILE] [--sizes 98 224] [--batches 1 8]
                             [--budgets 75% 50% 35%] [--scores FOLDER] [--threads 1] [--busy] [--json FILE]

A backbone is scored once, at the first size, on crops of photographs: its scores serve all sizes, as only time is
measured here. With --scores they are kept there, and taken from there. For each batch size the latency table is
measured; then both budgets are decided, and the two networks and the dense one are measured once more, in turns: these
are the shares in the table. Nothing is repaired, as latency does not depend on it. Weights and loaders are those of
backbone.py. With --busy times are the process's seconds on the processor, all threads together, in place of seconds:
for a machine that others use, with one thread.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import spvit
from backbone import crops, load_model, load_photographs
from reporting import check_free, write_results
from spvit.speed.benchmark import Program, measure_latencies


def scores_of(host: nn.Module, options: argparse.Namespace) -> spvit.Scores:
    """Return the scores of the backbone: kept ones, or new ones."""
    kept = None if options.scores is None else Path(options.scores) / str(options.sizes[0])
    if kept is not None and kept.is_dir():
        return spvit.Scores.load(kept)
    photographs = load_photographs(options.images)
    scores = spvit.score(host, crops(photographs, options.crops, options.size, 0, host.pretrained_cfg))
    if kept is not None:
        scores.save(kept)
    return scores


def rows_of(host: Any, scores: spvit.Scores, batch: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each budget at a batch size."""
    started = time.perf_counter()
    table = spvit.measure(host, batch)
    seconds, rows = time.perf_counter() - started, []
    for budget in options.budgets:
        row = {"size": options.size, "batch": batch, "asked": budget, "table_seconds": seconds}
        known, started = len(table.networks), time.perf_counter()
        try:
            by_time = spvit.decide(host, latency=budget, scores=scores, table=table)
        except spvit.BudgetError as error:
            rows.append({**row, "refused": str(error)})
            continue
        row |= {"decide_seconds": time.perf_counter() - started, "networks": len(table.networks) - known}
        by_macs = spvit.decide(host, macs=budget, scores=scores)
        names = {"latency": by_time, "macs": by_macs}
        models = [host, *(spvit.fold(spvit.prune(host, architecture)) for architecture in names.values())]
        dense, *others = measure_latencies([Program.of("", model) for model in models], batch, options.seconds)
        row |= {"dense_ms": dense.latency_ms, "dense_spread": dense.spread_ms / dense.latency_ms}
        for (name, architecture), own in zip(names.items(), others):
            row |= {f"{name}_share": 1 / own.speed_up, f"{name}_spread": own.spread_ms / own.latency_ms}
            row[f"{name}_macs"] = spvit.cost(host, architecture)["macs"] / spvit.cost(host)["macs"]
        rows.append(row)
    return rows


def shown(rows: list[dict[str, Any]]) -> Table:
    """Return the rows as a table."""
    columns = (
        "size",
        "batch",
        "asked",
        "got",
        "of MACs",
        "spread",
        "by MACs",
        "dense ms",
        "table s",
        "decide s",
        "tried",
    )
    table = Table(*columns)
    for row in rows:
        place = (str(row["size"]), str(row["batch"]), row["asked"])
        if "refused" in row:
            table.add_row(*place, row["refused"])
            continue
        spread = max(row[f"{name}_spread"] for name in ("latency", "macs", "dense"))
        shares = (
            f"{row['latency_share']:.1%}",
            f"{row['latency_macs']:.1%}",
            f"{spread:.1%}",
            f"{row['macs_share']:.1%}",
        )
        seconds = (f"{row['table_seconds']:.0f}", f"{row['decide_seconds']:.0f}", str(row["networks"]))
        table.add_row(*place, *shares, f"{row['dense_ms']:.1f}", *seconds)
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of photographs")
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--weights", help="safetensors file; downloaded when absent")
    parser.add_argument("--sizes", type=int, nargs="+", default=[98, 224])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--budgets", nargs="+", default=["75%", "50%", "35%"])
    parser.add_argument("--crops", type=int, default=256, help="crops to score with")
    parser.add_argument("--scores", help="folder to keep scores in")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each network, if seven rounds take less")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("--busy", action="store_true", help="count processor seconds")
    options = parser.parse_args()
    if options.busy:
        sys.modules["spvit.speed.benchmark"].__dict__["time"] = SimpleNamespace(perf_counter=time.process_time)
    check_free(options.json)
    torch.set_num_threads(options.threads)
    console, rows = Console(width=140), []
    scores = None
    for size in options.sizes:
        options.size = size
        host = load_model(options)
        scores = replace(scores or scores_of(host, options), weights=spvit.Host.of(host).fingerprint())
        for batch in options.batches:
            rows += rows_of(host, scores, batch, options)
            console.print(shown(rows))
            sys.stdout.flush()
    write_results(options.json, "latency", rows, model=options.model, device=options.device)


if __name__ == "__main__":
    main()
