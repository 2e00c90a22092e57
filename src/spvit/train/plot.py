"""The pictures of a frontier: accuracy or agreement against MACs, and against latency at each batch size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from spvit.budget import human
from spvit.train.drawing import Picture, Series, chart, in_a_row, write_png, write_svg
from spvit.train.points import Frontier


def frontier_pictures(found: Frontier) -> Iterator[Picture]:
    """Yield a chart for MACs and each batch size: the dense model with its level, and the budgets by name."""
    points, whole = found.points, found.points[0].quality
    name, heights = points[0].judged_by, [point.quality for point in points]
    costs = {"macs": ("MACs", "", [float(point.macs) for point in points])}
    for index, own in enumerate(points[0].latency):
        on = f" ({own.device}, {own.dtype}, threads {own.threads})"
        costs[str(own.batch)] = f"ms at batch {own.batch}", on, [point.latency[index].latency_ms for point in points]
    for key, (axis, on, values) in costs.items():
        places = list(zip(values, heights))
        hover = [f"{point.budget}: {point.words}, {human(value)} {axis}" for point, value in zip(points, values)]
        series = [
            Series("soft", [(min(values), whole), (max(values), whole)], "the dense model", style="dashed"),
            Series("msa", places[1:], "budgets", hover=hover[1:], labels=[point.budget for point in points[1:]]),
            Series("soft", places[:1], form="dot", hover=hover[:1]),
        ]
        title = f"{name.capitalize()} against {'MACs of an image' if key == 'macs' else 'latency'}"
        yield chart(f"frontier-{key}", title, "", series, (axis + on, ""), percent=True, whole=False)


def plot_frontier(found: Frontier, folder: Path) -> None:
    """Write frontier.svg and frontier.png to a folder. Needs the extra `report`."""
    picture = in_a_row("frontier", [*frontier_pictures(found)])
    write_svg(picture, folder / "frontier.svg")
    write_png(picture, folder / "frontier.png")
