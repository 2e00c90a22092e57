"""`spvit benchmark`: latency, throughput, memory and size of models, measured in turns."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from spvit.budget import human
from spvit.checkpoint import write_text
from spvit.cli.options import BenchmarkCommand
from spvit.cli.show import latency_table, right
from spvit.errors import RunFolderError
from spvit.speed.benchmark import Benchmark, benchmark


def benchmark_command(options: BenchmarkCommand, console: Console) -> None:
    """Print what was measured of models, as tables, and write it as JSON where a file is named."""
    if options.json is not None and Path(options.json).exists():
        raise RunFolderError(f"{options.json} exists already; name another file")
    settings = {item.name: getattr(options, item.name) for item in dataclasses.fields(options)}
    names, file = settings.pop("models"), settings.pop("json")
    with Console(stderr=True, quiet=console.quiet).status("measuring"):
        found = benchmark(*names, **settings)
    # Names that come twice, which shows the noise, are told apart by their places.
    names = [
        row.model if names.count(row.model) < 2 else f"{row.model} ({place})" for place, row in enumerate(found, 1)
    ]
    latencies = {name: row.latency for name, row in zip(names, found)}
    console.print(_sizes(found, max(options.batches)), latency_table(latencies))
    if file is not None:
        write_text(file, json.dumps([dataclasses.asdict(row) for row in found], indent=2) + "\n")


def _sizes(found: list[Benchmark], batch: int) -> Table:
    """Return what is measured of models once; peak memory is of a pass at this batch size."""
    table = Table(Column("model", overflow="fold"), "runs on", *right("params", "macs", "file", "memory"))
    for row in found:
        cells = ["" if count is None else human(count) for count in (row.params, row.macs)]
        cells += ["" if count is None else f"{count / 1e6:.1f} MB" for count in (row.file_bytes, row.peak_memory)]
        table.add_row(row.model, f"{row.backend}, {row.dtype}", *cells)
    table.caption, table.caption_justify = f"memory: what a pass of {batch} images takes beside the model", "left"
    return table
