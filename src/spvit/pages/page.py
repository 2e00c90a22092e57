"""The page about a run: one HTML file that loads nothing, readable on a phone, in light and dark."""

from __future__ import annotations

import importlib.util
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spvit.budget import human
from spvit.checkpoint import write_text
from spvit.errors import ReportError
from spvit.hosts.host import Host
from spvit.hosts.rebuild import can_build
from spvit.models import names_code
from spvit.pages.comparison import compared
from spvit.pages.contents import Contents, attempted, read
from spvit.pages.pictures import block_name, pictures
from spvit.train.drawing import COLOURS, Picture, framed, templates, write_png, write_svg
from spvit.train.figures import quality_of, said

MARK = '<meta name="generator" content="spvit">'
"""What tells a page of spvit from other files, which stay."""
MOST_IMAGES = 1000
BLOCKS = ("block", "attention", "FFN units", "MACs")
METRICS = {"macs": "MACs", "params": "parameters"}
SECTIONS = {
    "frontier": ("Every budget", "What is left of the network at each budget, and how good and how fast that is."),
    "network": ("The network, block by block", ""),
    "scores": ("What each choice cost", ""),
    "gates": ("The search", "Gates on the replacements learn with the weights; the decision follows them."),
    "curves": ("Training", ""),
    "images": ("Dense against pruned", ""),
}


@dataclass(frozen=True)
class Card:
    """One number of the headline, with what it was before."""

    name: str
    now: str
    notes: tuple[str, ...] = ()
    share: float | None = None
    """Of the dense network's; None: no bar."""


def report(
    run: str | Path,
    output: str | Path | None = None,
    *,
    host: nn.Module | Host | None = None,
    images: int | Tensor = 256,
    svg: bool = False,
    png: bool = False,
) -> Path:
    """Write one HTML page about a run, done or not, or a saved model, and return its path. It loads nothing.

    Args:
        run: a run folder, or what `spvit.save` wrote.
        output: the file; None: `report.html` in the run folder. A page that was there is replaced.
        host: the dense model, for one that neither timm nor transformers makes; it stays as it is.
        images: validation images of the run, at most, on which dense and pruned are compared; some are shown on the
            page, with where attention looks. 0: none are read or shown. A tensor, normalised as for the model, stands
            for them: [images, channels, height, width].
        svg: write each picture as SVG beside the page too, as `report-NAME.svg`.
        png: the same as PNG.

    Raises:
        RunFolderError: the folder holds nothing of a run.
        ReportError: a package is missing (extra `report`), or the file is none of spvit's pages.
    """
    needed = ["jinja2", *(["matplotlib"] if png else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ReportError(f"a report needs {' and '.join(missing)}; install with: pip install 'spvit[report]'")
    if not isinstance(images, Tensor) and not 0 <= images <= MOST_IMAGES:
        raise ReportError(f"images is {images}, expected 0 to {MOST_IMAGES:,}: they are kept in memory")
    contents = read(run, host)
    path = Path(output) if output is not None else contents.folder.report
    if path.is_dir() or (path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:500]):
        raise ReportError(f"{path} is no page of spvit's, so it stays as it is; name another file (--output)")
    parts: dict[str, list[Picture]] = {**pictures(contents), "images": []}
    says = ""
    if (isinstance(images, Tensor) or images > 0) and not contents.frontier:
        name = "dense against pruned"
        says, parts["images"] = attempted(
            contents.problems, name, lambda: compared(contents, host, images), (says, parts["images"])
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    page = templates(Path(__file__).parent).get_template("page.html")
    write_text(path, page.render(**_content(contents, parts, says)))
    for picture in (picture for own in parts.values() for picture in own):
        whole, beside = framed(picture), path.with_name(f"{path.stem}-{picture.name}")
        if svg:
            write_svg(whole, beside.with_suffix(".svg"))
        if png:
            write_png(whole, beside.with_suffix(".png"))
    return path


def _content(contents: Contents, parts: dict[str, list[Picture]], compared_says: str) -> dict[str, Any]:
    """Return all that the template fills in."""

    def tried(make: Callable[[Contents], Any], empty: Any = ()) -> Any:
        return attempted(contents.problems, "figures", lambda: make(contents), empty)

    titles = SECTIONS | {"images": (SECTIONS["images"][0], compared_says)}
    return {
        "name": contents.folder.path.resolve().name,
        "mark": MARK,
        "colours": COLOURS,
        "about": " · ".join(_about(contents)),
        "sentence": tried(_sentence, "What can be read of this run."),
        "state": tried(_state, ""),
        "cards": [*tried(_quality), *tried(_costs), *tried(_latencies)],
        "sections": [(*titles[name], parts[name]) for name in titles if parts.get(name)],
        "tables": {
            titles["network"][0]: (BLOCKS, tried(_blocks)),
            titles["frontier"][0]: tried(_budgets, ((), ())),
        },
        "commands": tried(_commands),
        "settings": contents.settings_text,
        "missing": [*_missing(contents, parts)],
        "written": f"Written by spvit {sys.modules['spvit'].__version__} on {time.strftime('%d %B %Y, %H:%M')}",
    }


def _about(contents: Contents) -> Iterator[str]:
    """Yield what the run is, in a few words each."""
    yield f"spvit {contents.command}" if contents.command else "A model that spvit saved"
    host = {} if contents.description is None else contents.description.host
    model = contents.settings.get("model") or host.get("name") or host.get("class")
    yield from [str(model)] if model else []
    yield from [f"data: {contents.settings['data']}"] if contents.settings.get("data") else []


def _state(contents: Contents) -> str:
    """Return how far an unfinished run is; empty for one that has written its result."""
    steps = [line for line in contents.lines if "phase" in line]
    at = f" It had come to epoch {steps[-1]['epoch']} of {steps[-1]['phase']}." if steps else ""
    if contents.failure is not None:
        return f"The run failed: {contents.failure}.{at}"
    if contents.finished:
        return ""
    ago = "less than a minute" if contents.age_s < 60 else f"{contents.age_s / 60:.0f} min"
    says = f"The run is under way, or was stopped: it last wrote {ago} before this page.{at}"
    undecided = " Nothing is decided yet: the network below is the dense one."
    return says if contents.folder.architecture.is_file() else says + undecided


def _sentence(contents: Contents) -> str:
    """Return what came out, in plain words."""
    if contents.frontier is not None:
        dense, *_, last = contents.frontier.points
        metric = contents.frontier.metric
        return (
            f"One scoring and {len(contents.frontier.points) - 1} budgets: at {last.budget} of the "
            f"{METRICS.get(metric, metric)} the {last.judged_by} is {last.written}, of the dense network "
            f"{dense.written}, on {contents.frontier.images:,} validation images."
        )
    costs, summary = contents.both("macs"), contents.summary
    if costs is None or not contents.finished:
        return "What is known of this model." if contents.finished else "What is known of this run so far."
    if contents.architecture is not None and costs[0] == costs[1]:
        return f"A dense network of {human(costs[0])} MACs an image."
    says = f"The pruned network takes {costs[1] / costs[0]:.0%} of the dense one's MACs"
    if "pruned" not in summary or "dense" not in summary:
        params = contents.both("params")
        return says + (f" and {params[1] / params[0]:.0%} of its parameters." if params is not None else ".")
    (name, now), (_, before), count = (
        quality_of(summary["pruned"]),
        quality_of(summary["dense"]),
        summary["pruned"]["images"],
    )
    if name == "agreement":
        return f"{says}; its agreement with the dense one is {now:.4f}, on {count:,} held-out images without labels."
    right = f"and is right on {now:.1%} of {count:,} validation images, the dense one on {before:.1%}"
    # Chance: 95 % of differences are smaller, as if the accuracies were not of the same images.
    change, chance = 100 * (now - before), 196 * math.sqrt((before * (1 - before) + now * (1 - now)) / count)
    if abs(change) <= chance:
        return f"{says} {right}: with so few images a difference below {chance:.1f} points can be chance."
    return f"{says} {right}: {abs(change):.1f} points {'more' if change > 0 else 'less'}."


def _quality(contents: Contents) -> list[Card]:
    """Return the accuracy or agreement, or what else a saved model says of itself."""
    summary = contents.summary
    if "pruned" in summary and "dense" in summary:
        pruned = summary["pruned"]
        before = {"dense": "dense", "after_pruning": "right after pruning"}
        notes = [f"{words} {said(*quality_of(summary[key]))}" for key, words in before.items() if key in summary]
        name, value = quality_of(pruned)
        return [Card(name, said(name, value), (*notes, f"{pruned['images']:,} validation images"))]
    metrics = contents.description.metrics if contents.description is not None else {}
    return [Card(name.replace("_", " "), said(name, value)) for name, value in metrics.items()]


def _costs(contents: Contents) -> list[Card]:
    cards = []
    for metric, name in METRICS.items():
        costs = contents.both(metric)
        name = f"{name} an image" if metric == "macs" else name
        if costs is not None and costs[0] == costs[1]:
            cards.append(Card(name, human(costs[0])))
        elif costs is not None:
            share = costs[1] / costs[0]
            cards.append(Card(name, human(costs[1]), (f"{share:.1%} of {human(costs[0])}",), share))
    return cards


def _latencies(contents: Contents) -> list[Card]:
    """Return the latency at each batch size, with what it was measured on, and the budget of one."""
    cards, settings, asked = [], contents.settings, contents.settings.get("latency")
    for before, now in zip(contents.latency.get("dense", []), contents.latency.get("pruned", [])):
        (low, high), noise = now.speed_up_range, "; noise" if now.within_noise else ""
        of = f"{now.speed_up:.2f}x as fast ({low:.2f} to {high:.2f}{noise})"
        threads = f"{now.threads} thread{'s'[: now.threads != 1]}"
        where = f"spread {now.spread_ms:.2f}; {now.device}, {now.dtype}, {threads}, {now.repeats} rounds"
        budget = [f"budget {asked}"] if now.batch == settings.get("latency_batch", 1) and asked else []
        notes = (*budget, f"dense {before.latency_ms:.2f} ms", of, where)
        cards.append(Card(f"latency, batch {now.batch}", f"{now.latency_ms:.2f} ms", notes, 1 / now.speed_up))
    return cards


def _blocks(contents: Contents) -> list[tuple[str, ...]]:
    """Return the rows of the table of blocks."""
    if contents.architecture is None:
        return []
    costs, rules = contents.costs["macs"].blocks if contents.costs else (), contents.architecture.rules
    rows: list[tuple[str, ...]] = []
    for index, block in enumerate(contents.architecture.blocks):
        cost = costs[index] if costs else None
        macs = "" if cost is None else f"{human(cost.of(block, rules))} of {human(cost.dense)}"
        units = f"{len(block.ffn.units):,} of {block.ffn.width:,}"
        rows.append((str(index), block_name(block, cost), units, macs))
    return rows


def _budgets(contents: Contents) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the head and the rows of the table of a frontier."""
    if contents.frontier is None:
        return (), []
    dense, rows = contents.frontier.points[0], []
    for point in contents.frontier.points:
        counts = ((point.macs, dense.macs), (point.params, dense.params))
        shares = [f"{human(own)} ({own / whole:.0%})" for own, whole in counts]
        measured = [f"{one.latency_ms:.2f}" for one in point.latency]
        rows.append((point.budget, point.written, *shares, *measured))
    times = [f"ms, batch {one.batch}" for one in dense.latency]
    return ("budget", dense.judged_by, "MACs", "parameters", *times), rows


def _commands(contents: Contents) -> list[str]:
    """Return the commands that make the run again, or go on from it."""
    folder, whole = (shlex.quote(str(path)) for path in (contents.folder.path, contents.config.parent))
    found, model, data = [], str(contents.settings.get("model")), contents.settings.get("data")
    typed = f" --model {shlex.quote(model)}" if names_code(model) else ""  # code is never taken from a file
    if contents.command:
        found.append(f"spvit {contents.command} --recipe {whole}/config.yaml --output {whole}-again{typed}")
        if not contents.finished:
            found.append(f"spvit {contents.command} --output {folder} --resume{typed}")
    if contents.description is not None and can_build(contents.description.host):
        images = f" --data {shlex.quote(str(data))}" if data else ""
        labelled = images and "accuracy" in contents.description.metrics
        found += [f"spvit evaluate --model {folder}{images}"] if labelled else []
        found += [f"spvit profile {folder} --latency", f"spvit export {folder} --to onnx{images}"]
    return [*found, f"spvit report {folder}{typed}"]


def _missing(contents: Contents, parts: dict[str, list[Picture]]) -> Iterator[tuple[str, str]]:
    """Yield what a reader may look for and not find, and why."""
    yield from contents.problems.items()
    if contents.frontier is not None:
        example = f"{contents.folder.path}/{contents.frontier.points[-1].folder}"
        yield "dense against pruned", f"each budget's folder has a page of its own: spvit report {example}"
        return
    if not contents.lines and "curves" not in contents.problems:
        yield "curves", "the run has trained nothing, or left no metrics.jsonl"
    if not parts["network"]:
        yield "the network", "nothing is decided yet"
    if not contents.latency and "latency" not in contents.problems:
        yield "latency", "the folder holds none; spvit compress measures it at its end"
