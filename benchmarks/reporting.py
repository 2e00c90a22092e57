"""What benchmarks share: the machine, medians, processes of their own, a run's JSON file."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Return what a figure was measured on."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    accelerator = {"accelerator": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "processor": model,
        **accelerator,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and the interquartile range."""
    if len(values) < 2:
        return median(values), 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return median(values), high - low


def peak_bytes() -> int:
    """Return the largest resident size that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def figures_of_process(arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the figures that a Python script prints as JSON on its last line, run in a process of its own."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def check_free(path: str | None) -> None:
    """Exit when the file that results are to go to exists already: before a long measurement, not after."""
    if path is not None and Path(path).exists():
        sys.exit(f"{path} exists already; name another file with --json")


def write_results(
    path: str | None, benchmark: str, rows: Sequence[dict[str, Any]], anew: bool = False, **more: Any
) -> None:
    """Write a run's rows as JSON, where a file is named; refuse to overwrite one unless the run itself writes anew."""
    if path is None:
        return
    if not anew:
        check_free(path)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": benchmark, "machine": machine(), **more, "rows": list(rows)}
    target.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
