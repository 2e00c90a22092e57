"""The speed-up of the published DeiT architectures against the speed-up that their MACs promise.

python benchmarks/inference.py [--models spvit_deit_tiny_patch16_224 ...] [--batches 1 8] [--dtypes fp32 bf16]
                               [--seconds 5] [--device cpu] [--compile] [--profile] [--json FILE]

Each dense model and its pruned, folded form have random weights and run in turns in one process, in evaluation mode,
eager, or with --compile by torch.compile (on CUDA with graphs). `held` is the speed-up divided by dense MACs / pruned
MACs. With --profile, `counted` is the share of the time in what MACs count (matrix products, convolutions, attention)
on both sides, and `of counted` what that alone holds: what is missing there is slower arithmetic, what is missing
beyond is norms, activations and copies.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import spvit
from reporting import check_free, machine, write_results
from spvit.architecture import Architecture
from spvit.hosts.host import input_size
from spvit.speed.benchmark import Latency, Program, measure_latencies
from spvit.zoo import host_name

COUNTED = {
    "aten::addmm",
    "aten::mm",
    "aten::bmm",
    "aten::mkldnn_convolution",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
}
PROFILED_PASSES = 10
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def rounded(architecture: Architecture, multiple: int) -> Architecture:
    """Return an architecture with its FFN widths rounded to the nearest multiple, as `spvit.decide` rounds them."""
    blocks = []
    for block in architecture.blocks:
        width = max(multiple, round(len(block.ffn.units) / multiple) * multiple)
        units = tuple(range(min(width, block.ffn.width)))
        blocks.append(replace(block, ffn=replace(block.ffn, units=units)))
    return replace(architecture, blocks=tuple(blocks))


@torch.no_grad()
def counted_seconds(model: nn.Module, images: torch.Tensor) -> tuple[float, float]:
    """Return the seconds of a few passes in operations that MACs count, and in all, by torch's profiler (CPU)."""
    model(images)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(PROFILED_PASSES):
            model(images)
    spent = {event.key: event.self_cpu_time_total / 1e6 for event in profile.key_averages()}
    return sum(seconds for name, seconds in spent.items() if name in COUNTED), sum(spent.values())


def profiled(sides: list[nn.Module], images: torch.Tensor, promise: float) -> dict[str, Any]:
    """Return the share of the time that MACs account for on both sides, and what that alone holds of the promise."""
    (dense, all_dense), (pruned, all_pruned) = (counted_seconds(side, images) for side in sides)
    return {
        "counted_dense": dense / all_dense,
        "counted_pruned": pruned / all_pruned,
        "counted_held": dense / pruned / promise,
    }


def measure(
    name: str,
    batches: list[int],
    dtypes: list[str],
    seconds: float,
    multiple: int = 1,
    profile: bool = False,
    device: str = "cpu",
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """Return a row for every dtype and batch size of one published architecture."""
    torch.manual_seed(0)
    architecture = rounded(spvit.architectures()[name], multiple)
    dense = timm.create_model(host_name(name)).eval()
    return measure_pruned(name, dense, architecture, batches, dtypes, seconds, profile, device, compiled)


def measure_pruned(
    name: str,
    dense: nn.Module,
    architecture: Architecture,
    batches: list[int],
    dtypes: list[str],
    seconds: float,
    profile: bool = False,
    device: str = "cpu",
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """Return a row for every dtype and batch size of a dense model and what an architecture makes of it."""
    dense_macs, pruned_macs = (spvit.cost(dense, kept)["macs"] for kept in (None, architecture))
    pruned = spvit.fold(spvit.prune(dense, architecture))
    rows = []
    for dtype in dtypes:
        sides: list[Any] = [copy.deepcopy(model).to(device, DTYPES[dtype]) for model in (dense, pruned)]
        for batch in batches:
            images = torch.randn(batch, *input_size(dense), dtype=DTYPES[dtype], device=device)
            timed = sides
            if compiled:
                torch._dynamo.reset()
                mode = "reduce-overhead" if images.is_cuda else "default"
                timed = [torch.compile(side, mode=mode) for side in sides]
            size, where = input_size(dense), (images.device.type, images.dtype)
            programs = [Program(name, side, size, *where) for side in timed]
            row = _row(name, dense_macs, pruned_macs, measure_latencies(programs, batch, seconds))
            row["compiled"] = compiled
            rows.append({**row, **(profiled(sides, images, row["promise"]) if profile else {})})
    return rows


def _row(name: str, dense_macs: int, pruned_macs: int, latencies: list[Latency]) -> dict[str, Any]:
    dense, pruned = latencies
    speed_up, promise = dense.latency_ms / pruned.latency_ms, dense_macs / pruned_macs
    return {
        "model": name,
        "dense_macs": dense_macs,
        "pruned_macs": pruned_macs,
        "dense": vars(dense),
        "pruned": vars(pruned),
        "speed_up": speed_up,
        "promise": promise,
        "held": speed_up / promise,
    }


def main() -> None:
    """Measure every model, print both sides of every ratio, and write them."""
    names = list(spvit.architectures())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=names, choices=names, help="published architectures")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="images a pass (default: 1 8)")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each side (default: %(default)s)")
    parser.add_argument(
        "--multiple", type=int, default=1, help="round the published FFN widths to (default: as they are)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="by torch.compile, on CUDA with graphs")
    parser.add_argument("--profile", action="store_true", help="tell what MACs count from the rest (on the CPU)")
    parser.add_argument("--json", help="file to write the rows to")
    options = parser.parse_args()
    check_free(options.json)
    console = Console(width=120)
    rows = []
    for name in options.models:
        settings = (options.batches, options.dtypes, options.seconds, options.multiple, options.profile)
        found = measure(name, *settings, options.device, options.compile)
        console.print(f"{name}: holds " + ", ".join(f"{row['held']:.2f}" for row in found), highlight=False)
        rows += found
    about = machine()
    where = f"{about['threads']} threads" if options.device == "cpu" else about["accelerator"]
    way = "compiled" if options.compile else "eager"
    table = Table(title=f"inference, {way}, FFN widths in multiples of {options.multiple}, {where}")
    extra = ("counted", "of counted") if options.profile else ()
    for column in ("model", "dtype", "batch", "dense ms", "pruned ms", "speed-up", "promise", "held", *extra):
        table.add_column(column, justify="left" if column in ("model", "dtype") else "right")
    for row in rows:
        dense, pruned = row["dense"], row["pruned"]
        table.add_row(
            row["model"].removeprefix("spvit_deit_").removesuffix("_patch16_224"),
            dense["dtype"],
            str(dense["batch"]),
            *(f"{side['latency_ms']:.1f}±{side['spread_ms']:.1f}" for side in (dense, pruned)),
            *(f"{row[key]:.2f}" for key in ("speed_up", "promise", "held")),
            *(
                [f"{row['counted_dense']:.2f} {row['counted_pruned']:.2f}", f"{row['counted_held']:.2f}"]
                if extra
                else []
            ),
        )
    console.print(table)
    write_results(options.json, "inference", rows, multiple=options.multiple)


if __name__ == "__main__":
    main()
