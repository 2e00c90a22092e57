"""A frontier as data and as a plot: the dense model and one for each budget, what each costs, how good and how fast.

A frontier's folder holds, beside config.yaml and the scores (`--scores` takes the folder):

    frontier.json               what was found; frontier.csv holds the same as a table
    frontier.svg, frontier.png  the plot, where the extra `report` is installed
    50pct/, 1.5G/, ...          a model for each budget, with its architecture.json

frontier.json: {"format": "spvit-frontier", "version": 1, "model", "metric": as in `frontier`, "images": how many
validation images, "seconds": {"scores", "latency"}, "unreached": {budget: why}, "points": [...]}. Points are the dense
model and then the budgets, the largest first, each {"budget": "dense" or "50%", "folder": its name in here (null of the
dense model), "macs", "params", "accuracy" (0 to 1; null of a backbone), "agreement" (null of a classifier), "seconds":
of its repair, evaluation and writing, "latency": [...]}. A latency is a `spvit.Latency`, one a batch size; the list is
empty until all budgets are done.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from spvit.budget import human
from spvit.checkpoint import write_text
from spvit.errors import RunFolderError
from spvit.fields import from_file
from spvit.speed.benchmark import Latency
from spvit.train.drawing import Picture, Series, chart, in_a_row, write_png, write_svg
from spvit.train.figures import Judged

FORMAT, VERSION = "spvit-frontier", 1
FILE = "frontier.json"
COLUMNS = ("latency_ms", "spread_ms", "speed_up")
"""What frontier.csv holds of a latency."""
DENSE = "dense"
"""What stands for the budget of the dense model."""


@dataclass(frozen=True)
class Point(Judged):
    """One model of a frontier, or the dense one."""

    budget: str
    folder: str | None
    macs: int
    params: int
    accuracy: float | None = None
    """Share of the validation images whose class is the first guess, where the model has classes."""
    agreement: float | None = None
    """Mean cosine to the dense outputs, of both less the mean of the dense ones, where it has none."""
    seconds: float = 0.0
    """Its share of what it took to repair, evaluate and write the budgets that were repaired side by side."""
    latency: tuple[Latency, ...] = ()


@dataclass(frozen=True)
class Frontier:
    """The dense model and one for each budget, largest first; and which budgets cannot be reached, and why."""

    model: str
    metric: str
    images: int = 0
    points: tuple[Point, ...] = ()
    unreached: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def load(folder: str | Path) -> Frontier:
        """Read a frontier's folder. Raises RunFolderError when it holds none that can be read."""
        try:
            return from_file(Frontier, Path(folder) / FILE, FORMAT, VERSION)
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{folder} holds no frontier that can be read ({FILE}: {error})") from error

    def save(self, folder: Path) -> None:
        """Write frontier.json and frontier.csv, each as a whole."""
        write_text(folder / FILE, json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=2) + "\n")
        with (folder / "frontier.csv").open("w", encoding="utf-8", newline="") as file:
            rows = []
            for point in self.points:
                row = {name: value for name, value in vars(point).items() if name != "latency"}
                for one in point.latency:
                    row |= {f"{name}_batch_{one.batch}": getattr(one, name) for name in COLUMNS}
                rows.append(row)
            # Budgets that were done before have latencies when the dense model has none yet.
            writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
            writer.writeheader()
            writer.writerows(rows)


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
