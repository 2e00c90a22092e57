"""The page about a run: one HTML file that loads nothing, readable on a phone, in light and dark."""

from __future__ import annotations

import importlib.util
import math
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from spvit.budget import human
from spvit.checkpoint import first_line, write_text
from spvit.errors import ReportError
from spvit.hosts.host import Host
from spvit.report.comparison import Compared, compared
from spvit.report.figures import block_name, pictures
from spvit.report.picture import COLOURS, Picture, framed, write_png
from spvit.report.reading import Reading, read

MARK = '<meta name="generator" content="spvit">'
"""What tells a page of spvit from other files, which stay."""


SECTIONS = {
    "network": ("The network, block by block", ""),
    "scores": ("What each choice cost", ""),
    "frontier": ("Every budget", "Accuracy against cost: the dense network, and what is left of it at each budget."),
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


def write_report(
    run: str | Path, output: str | Path | None, host: nn.Module | Host | None, images: int, svg: bool, png: bool
) -> Path:
    """Write the page about a run, as `spvit.report` says."""
    needed = ["jinja2", *(["matplotlib"] if png else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ReportError(f"a report needs {' and '.join(missing)}; install with: pip install 'spvit[report]'")
    reading = read(run, host)
    path = Path(output) if output is not None else reading.folder.report
    if path.is_dir() or (path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:500]):
        raise ReportError(f"{path} is no page of spvit's, so it stays as it is; name another file (--output)")
    parts, found = pictures(reading), None
    if images > 0:
        try:
            found = compared(reading, host, images)
        except Exception as error:  # whatever opening models and images of any library leads to; the page says it
            reading.problems["comparison"] = first_line(error)
    if found is not None:
        parts["images"] = list(found.pictures)
    path.parent.mkdir(parents=True, exist_ok=True)
    templates = _templates()
    write_text(path, templates.get_template("page.html").render(**_content(reading, parts, found)))
    for picture in (picture for own in parts.values() for picture in own):
        whole, beside = framed(picture), path.with_name(f"{path.stem}-{picture.name}")
        if svg:
            write_text(beside.with_suffix(".svg"), templates.get_template("picture.svg").module.alone(whole, COLOURS))
        if png:
            write_png(whole, beside.with_suffix(".png"))
    return path


def _templates() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _content(reading: Reading, parts: dict[str, list[Picture]], found: Compared | None) -> dict[str, Any]:
    """Return all that the template fills in."""
    titles = SECTIONS | ({"images": (SECTIONS["images"][0], found.says)} if found is not None else {})
    return {
        "name": reading.folder.path.resolve().name,
        "mark": MARK,
        "colours": COLOURS,
        "about": " · ".join(_about(reading)),
        "sentence": _sentence(reading),
        "state": _state(reading),
        "cards": [*_accuracy(reading), *_costs(reading), *_latencies(reading)],
        "sections": [(*titles[name], parts[name]) for name in titles if parts.get(name)],
        "blocks": _blocks(reading),
        "commands": _commands(reading),
        "settings": reading.settings_text,
        "missing": [*_missing(reading, parts)],
        "written": f"Written by spvit {version('spvit')} on {time.strftime('%d %B %Y, %H:%M')}",
    }


def _about(reading: Reading) -> Iterator[str]:
    """Yield what the run is, in a few words each."""
    yield f"spvit {reading.command}" if reading.command else "A model that spvit saved"
    host = {} if reading.description is None else reading.description.host
    model = reading.settings.get("model") or host.get("name") or host.get("class")
    yield from [str(model)] if model else []
    yield from [f"data: {reading.settings['data']}"] if reading.settings.get("data") else []


def _state(reading: Reading) -> str:
    """Return how far an unfinished run is; empty for one that has written its result."""
    steps = [line for line in reading.lines if "phase" in line]
    at = f" It had come to epoch {steps[-1]['epoch']} of {steps[-1]['phase']}." if steps else ""
    if reading.failure is not None:
        return f"The run failed: {reading.failure}.{at}"
    if reading.finished:
        return ""
    minutes = round(reading.age_s / 60)
    ago = f"{minutes} minutes" if minutes != 1 else "a minute"
    return f"The run is under way, or was stopped: it last wrote {ago} before this page.{at}"


def _sentence(reading: Reading) -> str:
    """Return what came out, in plain words."""
    if reading.frontier:
        return "One scoring of the model, and what is left of it at every budget."
    costs, summary = reading.both("macs"), reading.summary
    if costs is None or not reading.finished:
        return "What is known of this run so far." if not reading.finished else "What is known of this model."
    if reading.architecture is not None and costs[0] == costs[1]:
        return f"A dense network of {human(costs[0])} MACs an image."
    says = f"The pruned network takes {costs[1] / costs[0]:.0%} of the dense one's MACs"
    if "pruned" not in summary or "dense" not in summary:
        return f"{says}."
    before, now, count = summary["dense"]["accuracy"], summary["pruned"]["accuracy"], summary["pruned"]["images"]
    right = f"and is right on {now:.1%} of {count:,} validation images, the dense one on {before:.1%}"
    change, chance = 100 * (now - before), 100 * _chance(before, now, count)
    if abs(change) <= chance:
        return f"{says} {right}: with so few images a difference below {chance:.1f} points can be chance."
    return f"{says} {right}: {abs(change):.1f} points {'more' if change > 0 else 'less'}."


def _chance(before: float, now: float, count: int) -> float:
    """Return which difference of two accuracies on so many images can be chance (95 %, as if not the same images)."""
    return 1.96 * math.sqrt((before * (1 - before) + now * (1 - now)) / count)


def _accuracy(reading: Reading) -> Iterator[Card]:
    """Yield the accuracy, or what else a saved model says of itself."""
    summary = reading.summary
    if "pruned" in summary and "dense" in summary:
        now, before, between = (summary[name] for name in ("pruned", "dense", "after_pruning"))
        notes = (f"dense {before['accuracy']:.2%}", f"right after pruning {between['accuracy']:.2%}")
        yield Card("accuracy", f"{now['accuracy']:.2%}", (*notes, f"{now['images']:,} validation images"))
        return
    for name, value in (reading.description.metrics if reading.description is not None else {}).items():
        yield Card(name.replace("_", " "), f"{value:.2%}" if name.startswith("accuracy") else f"{value:.4g}")


def _costs(reading: Reading) -> Iterator[Card]:
    for metric, name in (("macs", "MACs an image"), ("params", "parameters")):
        costs = reading.both(metric)
        if costs is not None and costs[0] == costs[1]:
            yield Card(name, human(costs[0]))
        elif costs is not None:
            share = costs[1] / costs[0]
            yield Card(name, human(costs[1]), (f"{share:.1%} of {human(costs[0])}",), share)


def _latencies(reading: Reading) -> Iterator[Card]:
    """Yield the latency at each batch size, with what it was measured on."""
    for before, now in zip(reading.latency.get("dense", []), reading.latency.get("pruned", [])):
        share = now["latency_ms"] / before["latency_ms"]
        times = [f"{one['latency_ms']:.2f} ms ± {one['spread_ms'] / 2:.2f}" for one in (before, now)]
        noise = ", within the noise" if now.get("within_noise") else ""
        of = f"{share:.0%} of {times[0]}{noise}"
        where = f"{now['device']}, {now['dtype']}, {now['threads']} thread{'s'[: now['threads'] != 1]}, {now['repeats']} rounds"
        yield Card(f"latency, batch {now['batch']}", times[1], (of, where), share)


def _blocks(reading: Reading) -> list[tuple[str, ...]]:
    """Return the rows of the table of blocks."""
    if reading.architecture is None:
        return []
    costs, rules = reading.costs["macs"].blocks if reading.costs else (), reading.architecture.rules
    rows = []
    for index, block in enumerate(reading.architecture.blocks):
        cost = costs[index] if costs else None
        macs = "" if cost is None else f"{human(cost.of(block, rules))} of {human(cost.dense)}"
        units = f"{len(block.ffn.units):,} of {block.ffn.width:,}"
        rows.append((str(index), block_name(block, cost), units, macs))
    return rows


def _commands(reading: Reading) -> list[str]:
    """Return the commands that make the run again, or go on from it."""
    folder, data = shlex.quote(str(reading.folder.path)), reading.settings.get("data")
    found = []
    if reading.command:
        found.append(f"spvit {reading.command} --recipe {folder}/config.yaml --output {folder}-again")
        if not reading.finished:
            found.append(f"spvit {reading.command} --output {folder} --resume")
    if reading.description is not None:
        found += [f"spvit evaluate --model {folder} --data {shlex.quote(str(data))}"] if data else []
        found += [f"spvit profile {folder} --latency", f"spvit export {folder} --to onnx"]
    return [*found, f"spvit report {folder}"]


def _missing(reading: Reading, parts: dict[str, list[Picture]]) -> Iterator[tuple[str, str]]:
    """Yield what a reader may look for and not find, and why."""
    yield from reading.problems.items()
    if not reading.lines:
        yield "curves", "the run trained nothing yet, or left no metrics.jsonl"
    if reading.architecture is None:
        yield "the network", "nothing is decided yet, or the folder holds several budgets"
    if not reading.latency:
        yield "latency", "the folder holds none; spvit compress measures it at its end"
