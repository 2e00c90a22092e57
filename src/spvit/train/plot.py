"""The picture of a frontier: accuracy or agreement against MACs, and against latency at each batch size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spvit.budget import human
from spvit.train.points import Frontier

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "spvit",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
SUFFIXES = (".svg", ".png")


def plot_frontier(found: Frontier, folder: Path) -> None:
    """Write frontier.svg and frontier.png to a folder. Needs matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    dense = found.points[0]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * (1 + len(dense.latency)), 3.4), layout="constrained", dpi=150)
        first, *others = figure.subplots(1, 1 + len(dense.latency), sharey=True, squeeze=False)[0]
        first.set(xlabel="MACs of one image", ylabel=dense.words.split()[0])
        first.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value)))
        if dense.accuracy is not None:
            first.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        _draw(first, found, [point.macs for point in found.points], None)
        for index, axes in enumerate(others):
            own = [point.latency[index] for point in found.points]
            axes.set(xlabel=f"ms at batch {own[0].batch} ({own[0].device}, {own[0].dtype}, threads {own[0].threads})")
            _draw(axes, found, [one.latency_ms for one in own], [one.spread_ms / 2 for one in own])
        figure.suptitle(f"{found.model}, budgets of {found.metric}, {found.images:,} validation images")
        for suffix in SUFFIXES:
            figure.savefig(folder / f"frontier{suffix}", metadata={"Date": None} if suffix == ".svg" else None)


def _draw(axes: Any, found: Frontier, costs: Sequence[float], spreads: Sequence[float] | None) -> None:
    """Draw how good points are against what they cost: the dense one with its level, and the budgets by name."""
    (dense, *points), (whole, *spent) = found.points, costs
    half = None if spreads is None else spreads[1:]
    axes.axhline(dense.quality, color="black", linewidth=0.8, linestyle=":")
    axes.errorbar(spent, [point.quality for point in points], xerr=half, marker="o", markersize=4, linewidth=1)
    axes.errorbar(whole, dense.quality, xerr=None if spreads is None else spreads[0], marker="*", color="black")
    for point, cost in zip(found.points, costs):
        place = {"xytext": (0, 5 if point is dense else -12), "textcoords": "offset points", "ha": "center"}
        axes.annotate(point.budget, (cost, point.quality), fontsize=8, **place)
    axes.margins(0.1, 0.15)
    axes.set_xlim(left=0)
