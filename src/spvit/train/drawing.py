"""Pictures as data, and how they become SVG (with hover, in the colours of the reader's theme) or PNG.

Lengths are in pixels of a desktop screen; on a phone the pictures shrink and their letters grow.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spvit.budget import human
from spvit.checkpoint import write_text

COLOURS = {
    "msa": ("#0072b2", "#4aa8e0"),
    "conv3": ("#e69f00", "#f0b73f"),
    "conv1": ("#cc6699", "#e08fba"),
    "skip": ("#aab4bf", "#55606c"),
    "ffn": ("#5f8f86", "#6fae9f"),
    "ink": ("#17202a", "#e8edf2"),
    "soft": ("#5a6673", "#9fabb8"),
    "rule": ("#dde3e9", "#2e3742"),
    "outline": ("#b4bec9", "#55606c"),
    "paper": ("#ffffff", "#12171d"),
    "card": ("#f5f7f9", "#1a2129"),
}
"""Light and dark, by role. Kinds of layers are told apart by colour-blind readers too (after Okabe and Ito)."""
LETTERS = 12.0
FEW = 12
"""Points of a line that are seen as dots."""


@dataclass(frozen=True)
class Mark:
    """One thing drawn: a `box`, `line`, `area`, `dot`, `text` or `image`."""

    form: str
    role: str
    """What colours it."""
    points: tuple[tuple[float, float], ...]
    """Corner and size of a box or image; corners of a line or area; centre of a dot; where text stands."""
    text: str = ""
    """What text says, what hovering over others says, or an image as a data URI."""
    anchor: str = "start"
    style: str = ""
    """`hollow` or `dashed` outlines, `faint` boxes, `bold` text."""


@dataclass(frozen=True)
class Picture:
    """A named picture with what it shows in words."""

    name: str
    title: str
    says: str
    width: float
    height: float
    marks: tuple[Mark, ...]
    legend: tuple[tuple[str, str], ...] = ()
    """Roles, and what they stand for."""

    @property
    def tiles(self) -> bool:
        """Whether it is of images, which need not be large."""
        return any(mark.form == "image" for mark in self.marks)


@dataclass(frozen=True)
class Series:
    """What a chart draws together."""

    role: str
    points: Sequence[tuple[float, float]]
    name: str = ""
    form: str = "line"
    hover: Sequence[str] = ()
    labels: Sequence[str] = ()
    """Words beside the points."""
    style: str = ""


def box(role: str, x: float, y: float, width: float, height: float, text: str = "", style: str = "") -> Mark:
    """Return a box by its corner and size."""
    return Mark("box", role, ((x, y), (width, height)), text, style=style)


def word(text: str, x: float, y: float, role: str = "soft", anchor: str = "middle", style: str = "") -> Mark:
    """Return text."""
    return Mark("text", role, ((x, y),), text, anchor, style)


@dataclass(frozen=True)
class Frame:
    """The axes of a chart: values to places."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: float = 480
    height: float = 260
    left: float = 58
    top: float = 14
    right: float = 16
    bottom: float = 46
    percent: bool = False
    """Whether heights are shares."""
    whole: bool = True
    """Whether whole numbers alone are marked across."""

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return where a value stands."""
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        inner = (self.width - self.left - self.right, self.height - self.top - self.bottom)
        return round(self.left + across * inner[0], 2), round(self.height - self.bottom - up * inner[1], 2)


def chart(
    name: str, title: str, says: str, series: Sequence[Series], labels: tuple[str, str], **options: Any
) -> Picture:
    """Return lines, areas or dots over labelled axes. options: of the Frame; `x` and `y` are ranges of the axes."""
    points = [point for one in series for point in one.points]
    least = (0.0, 0.01 if options.get("percent") else 0.0)
    ranges = {
        axis: options.pop(axis, None) or _range([point[index] for point in points], least[index])
        for index, axis in enumerate("xy")
    }
    frame = Frame(ranges["x"], ranges["y"], **options)
    marks: list[Mark] = []
    for value in ticks(*frame.y):
        x, y = frame.at(frame.x[0], value)
        label = f"{100 * value:.3g} %" if frame.percent else human(value)
        marks += [
            Mark("line", "rule", ((x, y), (frame.width - frame.right, y))),
            word(label, x - 8, y + 4, anchor="end"),
        ]
    for value in ticks(*frame.x, whole=frame.whole):
        x, y = frame.at(value, frame.y[0])
        marks.append(word(human(value), x, y + 18))
    marks.append(word(labels[0], (frame.left + frame.width - frame.right) / 2, frame.height - 8))
    for one in series:
        places = tuple(frame.at(*point) for point in one.points)
        if one.form in ("line", "area"):
            text = one.hover[0] if one.form == "area" and one.hover else ""
            marks.append(Mark(one.form, one.role, places, text, style=one.style))
        if one.form == "dot" or (one.form == "line" and one.hover):
            form = "dot" if one.form == "dot" or len(places) <= FEW else "spot"  # a spot shows under the pointer
            hover = one.hover or [""] * len(places)
            marks += [Mark(form, one.role, (place,), text) for place, text in zip(places, hover)]
        marks += [word(label, x, y - 11) for label, (x, y) in zip(one.labels, places)]
    legend = tuple(dict.fromkeys((one.role, one.name) for one in series if one.name))
    says += f" Upwards: {labels[1]}." if labels[1] else ""
    return Picture(name, title, says, frame.width, frame.height, tuple(marks), legend)


def _range(values: Sequence[float], least: float) -> tuple[float, float]:
    """Return what an axis spans: the values with a margin of at least so much."""
    low, high = min(values), max(values)
    margin = max(least, (high - low) * 0.06) or abs(high) * 0.06 or 1
    return low - margin, high + margin


def ticks(low: float, high: float, most: int = 5, whole: bool = False) -> list[float]:
    """Return round values between two others, about so many."""
    rough = (high - low) / most or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    step = max(1.0, round(step)) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def framed(picture: Picture) -> Picture:
    """Return a picture with its title above and its legend below, to stand alone."""
    place, marks = 24.0, [word(picture.title, 24, 30, "ink", "start", "bold")]
    for role, name in picture.legend:
        style = {"outline": "hollow", "skip": "dashed"}.get(role, "")
        marks += [box(role, place, picture.height + 62, 11, 11, style=style)]
        marks += [word(name, place + 17, picture.height + 72, "ink", "start")]
        place += 34 + 6.4 * len(name)
    moved = [replace(mark, points=_moved(mark, 24, 48)) for mark in picture.marks]
    height = picture.height + (90 if picture.legend else 66)
    return replace(picture, width=picture.width + 48, height=height, marks=(*marks, *moved))


def _moved(mark: Mark, right: float, down: float) -> tuple[tuple[float, float], ...]:
    """Return the places of a mark that is moved; the second of a box is its size."""
    corners = mark.points[:1] if mark.form in ("box", "image") else mark.points
    return (*((x + right, y + down) for x, y in corners), *mark.points[len(corners) :])


def in_a_row(name: str, pictures: Sequence[Picture]) -> Picture:
    """Return pictures in frames, side by side, as one."""
    marks, place = [], 0.0
    for picture in map(framed, pictures):
        marks += [replace(mark, points=_moved(mark, place, 0)) for mark in picture.marks]
        place += picture.width
    return Picture(name, "", "", place, max(framed(picture).height for picture in pictures), tuple(marks))


def templates(*folders: Path) -> Any:
    """Return what renders the templates in folders and the one of pictures."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader([*folders, Path(__file__).parent])
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def write_svg(picture: Picture, path: Path) -> None:
    """Write a picture as SVG, with hover, in the colours of the reader's theme."""
    write_text(path, templates().get_template("picture.svg").module.alone(picture, COLOURS))


def write_png(picture: Picture, path: Path) -> None:
    """Write a picture as PNG, in light colours and twice its size."""
    from matplotlib.figure import Figure

    figure = Figure((picture.width / 100, picture.height / 100), dpi=200, facecolor=COLOURS["paper"][0])
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, picture.width), ylim=(picture.height, 0))
    axes.axis("off")
    for mark in picture.marks:
        _draw(axes, mark)
    figure.savefig(path)


def _draw(axes: Any, mark: Mark) -> None:
    """Draw one thing by matplotlib."""
    from matplotlib.patches import Polygon, Rectangle
    from PIL import Image

    colour, (x, y) = COLOURS[mark.role][0], mark.points[0]
    faces = ("none", colour) if mark.style in ("hollow", "dashed") else (colour, "none")
    style: dict[str, Any] = {"facecolor": faces[0], "edgecolor": faces[1], "linewidth": 0.6}
    style["alpha"] = 0.45 if mark.style == "faint" else 1.0
    if mark.form == "box":
        axes.add_patch(Rectangle((x, y), *mark.points[1], linestyle="--" if mark.style == "dashed" else "-", **style))
    elif mark.form == "area":
        axes.add_patch(Polygon(mark.points, **style))
    elif mark.form == "line":
        width = 0.5 if mark.role == "rule" else 1.4
        axes.plot(*zip(*mark.points), color=colour, linewidth=width, linestyle="--" if mark.style == "dashed" else "-")
    elif mark.form == "dot":
        axes.plot(x, y, "o", color=colour, markersize=5)
    elif mark.form == "text":
        side = {"start": "left", "middle": "center", "end": "right"}[mark.anchor]
        weight = "bold" if mark.style == "bold" else "normal"
        axes.text(x, y, mark.text, color=colour, ha=side, va="baseline", fontsize=LETTERS * 0.72, fontweight=weight)
    elif mark.form == "image":
        (width, height), data = mark.points[1], base64.b64decode(mark.text.partition(",")[2])
        axes.imshow(Image.open(io.BytesIO(data)), extent=(x, x + width, y + height, y), aspect="auto")
