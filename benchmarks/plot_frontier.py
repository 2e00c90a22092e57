"""Accuracy against the share of MACs, a line a method, from what fashion_mnist.py has written: an SVG.

python benchmarks/plot_frontier.py FILE.json [FILE.json ...] [--output docs/frontier.svg]

Solid lines are fine-tuned, dashed ones right after pruning. Files are to be of one dense model; where they hold a
method at a budget twice, the last counts. Of random architectures the mean is drawn. Needs matplotlib:
pip install 'spvit[bench]'.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

ONE_OF_MANY = re.compile(r"random \d+")
WHOLE = "100%"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "spvit", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}


def read_runs(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Return the content of files, or exit when one is of another benchmark or another dense model."""
    runs = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    for path, run in zip(paths, runs):
        if run["benchmark"] != "fashion_mnist":
            sys.exit(f"{path} is of the benchmark {run['benchmark']}, expected fashion_mnist")
        if run["dense"]["accuracy"] != runs[0]["dense"]["accuracy"]:
            sys.exit(f"the dense model of {path} is not that of {paths[0]}; give files of one")
    return runs


def lines_of(runs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every method by ascending share, without the dense model and single random architectures."""
    methods: dict[str, dict[str, dict[str, Any]]] = {}
    for row in (row for run in runs for row in run["rows"]):
        if row["budget"] != WHOLE and not ONE_OF_MANY.fullmatch(row["method"]):
            methods.setdefault(row["method"], {})[row["budget"]] = row
    return {name: sorted(rows.values(), key=lambda row: row["share"]) for name, rows in methods.items()}


def draw(axes: Axes, runs: Sequence[dict[str, Any]]) -> None:
    """Draw one or two lines a method: two where fine-tuning has changed the accuracy."""
    drawn: list[list[float]] = []
    for index, (method, rows) in enumerate(lines_of(runs).items()):
        shares, pruned, tuned = ([row[name] for row in rows] for name in ("share", "after_pruning", "accuracy"))
        color, marker = f"C{index}", "os^Dv<>"[index % 7]
        if tuned != pruned:
            axes.plot(shares, tuned, color=color, marker=marker, markersize=4, label=method)
        if pruned not in drawn:
            # Methods that share a pruned network would draw over each other.
            label = f"{method}, right after pruning" if tuned != pruned else method
            axes.plot(shares, pruned, "--", color=color, marker=marker, markersize=4, mfc="white", label=label)
            drawn.append(pruned)
    axes.axhline(runs[0]["dense"]["accuracy"], color="black", linewidth=0.8, linestyle=":", label="dense")
    axes.set(xlabel="share of the dense model's MACs", ylabel="accuracy")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def main() -> None:
    """Read, draw, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="what fashion_mnist.py has written with --json")
    parser.add_argument("--output", default="docs/frontier.svg", help="overwritten (default: %(default)s)")
    options = parser.parse_args()
    runs = read_runs(options.files)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 5.0), layout="constrained")
        draw(axes, runs)
        figure.suptitle(runs[0]["title"].split(",")[0])
        figure.legend(fontsize=8, loc="outside lower center", ncols=2)
        figure.savefig(options.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
