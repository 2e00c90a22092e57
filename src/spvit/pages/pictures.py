"""The pictures of a run: its network block by block, what each choice cost, curves, gates, and a frontier."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

from spvit.architecture import KINDS, Architecture, Attention, Block
from spvit.budget import human
from spvit.cost import BlockCost
from spvit.pages.contents import Contents, attempted
from spvit.train.drawing import Mark, Picture, Series, box, chart, word
from spvit.train.figures import quality_of, said
from spvit.train.points import frontier_pictures

NAMES = {
    "msa": "attention",
    "conv3": "3 x 3 convolution",
    "conv1": "1 x 1 convolution",
    "skip": "no attention",
    "ffn": "FFN units",
}
PHASES = {"dense": "The dense model", "search": "Search", "finetune": "Fine-tuning"}
WIDTH, ATTENTION, FFN_HEIGHT = 720.0, 72.0, 150.0
MOST_POINTS = 240
"""Of a curve; more do not show."""


def pictures(contents: Contents) -> dict[str, list[Picture]]:
    """Return the pictures that a run has, by section; what cannot be drawn of old or damaged files is noted."""
    draws = {"network": _network, "scores": _scores, "frontier": _frontier, "gates": _gates, "curves": _curves}
    nothing: list[Picture] = []
    return {
        name: attempted(contents.problems, name, lambda draw=draw: list(draw(contents)), nothing)  # type: ignore[misc]
        for name, draw in draws.items()
    }


def block_name(block: Block, cost: BlockCost | None) -> str:
    """Return what stands for a block's attention in words, with the dense numbers where they are known."""
    kept, parts = block.attention, []
    if kept.kind != "msa":
        return NAMES[kept.kind]
    if not kept.narrowed():
        return "whole attention" if block.tokens == "all" else "attention of the prefix tokens alone"
    of = ("", "", "") if cost is None else (f" of {cost.heads}", *[f" of {cost.head_width}"] * 2)
    if kept.heads is not None:
        parts.append(f"{len(kept.heads)}{of[0]} heads")
    for rank, name, dense in ((kept.query_key_rank, "queries and keys", of[1]), (kept.value_rank, "values", of[2])):
        if rank is not None:
            parts.append(f"{name} {rank}{dense}")
    return f"attention, {', '.join(parts)}{'' if block.tokens == 'all' else '; of the prefix tokens alone'}"


def _network(contents: Contents) -> Iterator[Picture]:
    """Yield a column a block: what stands for its attention above, its FFN below, each in its dense outline."""
    architecture = contents.architecture
    if architecture is None:
        yield from _budgets(contents)
        return
    blocks, widest = architecture.blocks, max(block.ffn.width for block in architecture.blocks)
    costs = contents.costs["macs"].blocks if contents.costs else (None,) * len(blocks)
    stages = [len(list(group)) for _, group in groupby(block.ffn.width for block in blocks)]
    gap = 14.0 if len(stages) > 1 else 0.0
    pitch = (WIDTH - gap * (len(stages) - 1)) / (len(blocks) - 0.2)  # the last one ends the picture
    inner, top = min(0.8 * pitch, 140.0), 56.0 if len(stages) > 1 else 26.0
    bottom = top + ATTENTION + 38 + FFN_HEIGHT
    marks = [word("Attention", 0, top - 9, anchor="start"), word("FFN", 0, bottom - FFN_HEIGHT - 9, anchor="start")]
    starts = [gap * stage + pitch * sum(stages[:stage]) for stage in range(len(stages))]
    for stage, (start, count) in enumerate(zip(starts, stages) if len(stages) > 1 else ()):
        end = start + (count - 1) * pitch + inner
        marks.append(word(str(stage + 1), (start + end) / 2, 15, "ink", style="bold"))
        marks.append(Mark("line", "outline", ((start, 24), (end, 24))))
    places = [start + pitch * index for start, count in zip(starts, stages) for index in range(count)]
    for index, (block, cost, x) in enumerate(zip(blocks, costs, places)):
        texts = _hovers(index, block, cost, architecture)
        marks += _attention_marks(block, cost, x, top, inner, texts[0])
        outline = FFN_HEIGHT * math.sqrt(block.ffn.width / widest)
        share = len(block.ffn.units) / block.ffn.width
        style = "" if block.tokens == "all" else "faint"
        marks += [
            box("ffn", x, bottom - outline * share, inner, outline * share, style=style),
            box("outline", x, bottom - outline, inner, outline, texts[1], "hollow"),
        ]
        if index % math.ceil(len(blocks) / 16) == 0:
            marks.append(word(str(index), x + inner / 2, bottom + 22))
    legend = [(kind, NAMES[kind]) for kind in KINDS if kind in architecture.kinds()] + [("ffn", NAMES["ffn"])]
    legend.append(("outline", "the dense network"))
    yield Picture(
        name="network",
        title="The network, block by block",
        says="A column is a block. Its attention is above: the colour is its kind, the width what is kept of its heads "
        "and dimensions (upper half queries and keys, lower half values). Below are its FFN's hidden units, by height. "
        f"Outlines are the dense network.{_also(architecture, len(stages))}",
        width=WIDTH,
        height=bottom + 30,
        marks=tuple(marks),
        legend=tuple(legend),
    )


def _budgets(contents: Contents) -> Iterator[Picture]:
    """Yield the network at each budget of a frontier, the first with what it shows in words."""
    told = False
    for point in () if contents.frontier is None else contents.frontier.points[1:]:
        path = contents.folder.path / str(point.folder) / contents.folder.architecture.name
        if path.is_file():
            for picture in _network(replace(contents, architecture=Architecture.load(path))):
                picture = replace(picture, name=f"network-{point.folder}", title=point.budget)
                yield picture if not told else replace(picture, says="", legend=())
                told = True


def _also(architecture: Architecture, stages: int) -> str:
    """Return what some networks' pictures show besides."""
    says = " Numbers above are stages." if stages > 1 else ""
    if architecture.blocks[-1].tokens != "all":
        last = len(architecture.blocks) - 1
        says += f" Block {last}, pale, runs for the prefix tokens alone: nothing reads the others."
    return says


def _attention_marks(
    block: Block, cost: BlockCost | None, x: float, top: float, inner: float, text: str
) -> Iterator[Mark]:
    """Yield what is kept of a block's attention in its outline; attention in halves, queries and keys, and values."""
    kept, faint = block.attention, "" if block.tokens == "all" else "faint"
    if kept.kind != "msa":
        if kept.kind != "skip":
            yield box(kept.kind, x, top, inner, ATTENTION)
        yield box("outline", x, top, inner, ATTENTION, text, "dashed" if kept.kind == "skip" else "hollow")
        return
    heads, high = 1.0 if kept.heads is None or cost is None else len(kept.heads) / cost.heads, (ATTENTION - 4) / 2
    for y, rank in ((top, kept.query_key_rank), (top + high + 4, kept.value_rank)):
        share = heads * (1.0 if rank is None or cost is None else rank / cost.head_width)
        yield box("msa", x, y, inner * share, high, style=faint)
        yield box("outline", x, y, inner, high, text, "hollow")


def _hovers(index: int, block: Block, cost: BlockCost | None, architecture: Architecture) -> tuple[str, str]:
    """Return what hovering over a block's attention and its FFN says."""
    attention = f"block {index}: {block_name(block, cost)}"
    ffn = f"block {index}: {len(block.ffn.units)} of {block.ffn.width} FFN units"
    if cost is None:
        return attention, ffn
    own = cost.prefix_only if block.tokens != "all" and cost.prefix_only is not None else cost
    now, before = own.attention(block.attention, architecture.rules), cost.attention(Attention())
    units, whole = own.unit * len(block.ffn.units), cost.unit * cost.units
    of = [f"{human(some)} of {human(every)} MACs" for some, every in ((now, before), (units, whole))]
    return f"{attention}; {of[0]}", f"{ffn}; {of[1]}"


def _scores(contents: Contents) -> Iterator[Picture]:
    """Yield how much each block's choices cost in agreement with the dense network, as it was scored."""
    if contents.scores is None or contents.architecture is None:
        return
    bars: list[Series] = []
    for index, (block, scores) in enumerate(zip(contents.architecture.blocks, contents.scores.blocks)):
        known = {kept: score for kept, score in scores.attention}
        others = ", ".join(f"{NAMES[kept.kind]} {score:.2g}" for kept, score in scores.attention if kept.kind != "msa")
        attention, units = known.get(block.attention), scores.ffn[len(block.ffn.units)]
        costs = "was not scored" if attention is None else f"costs {attention:.2g}"
        count, half = f"{len(block.ffn.units)} of {block.ffn.width}", scores.ffn[block.ffn.width // 2]
        texts = (
            f"block {index}: {block_name(block, None)} {costs}; {others}",
            f"block {index}: {count} FFN units cost {units:.2g}; half {half:.2g}",
        )
        low, sides = 0.0, (index - 0.36, index + 0.36)
        for role, score, text in zip((block.attention.kind, "ffn"), (attention or 0.0, units), texts):
            corners = [(sides[0], low), (sides[0], low + score), (sides[1], low + score), (sides[1], low)]
            bars.append(Series(role, corners, NAMES[role], "area", [text]))
            low += score
    most = max(series.points[1][1] for series in bars) or 1.0
    power = min(0, math.floor(math.log10(most)))
    unit = f", in units of 1e{power}" if power < -1 else ""
    bars = [replace(one, points=[(x, y / 10**power) for x, y in one.points]) for one in bars] if unit else bars
    most = most / 10**power if unit else most
    name = contents.scores.objective
    cost = "divergence of the class probabilities" if name == "logits" else f"relative squared error of {name}"
    yield chart(
        "scores",
        "What each choice cost",
        "How far the outputs move from the dense network's when this choice alone is made and repaired, on images that "
        "the repair has not seen. Hover for what else could have stood there.",
        bars,
        ("block", cost + unit),
        x=(-0.6, len(contents.scores.blocks) - 0.4),
        y=(0.0, 1.06 * most),
        width=WIDTH,
        height=230.0,
    )


def _frontier(contents: Contents) -> Iterator[Picture]:
    """Yield accuracy, or agreement of a backbone, against MACs, and against latency at each batch size."""
    if contents.frontier is not None:
        yield from frontier_pictures(contents.frontier)


def _curves(contents: Contents) -> Iterator[Picture]:
    """Yield the loss and the accuracy, or agreement, of each phase over its epochs."""
    for phase, title in PHASES.items():
        own = [line for line in contents.lines if line.get("phase") == phase]
        steps, ends = ([line for line in own if line["event"] == event] for event in ("step", "evaluation"))
        steps = [line for line in steps if math.isfinite(line["loss"])]
        if steps:
            each = steps[-1]["step"] / steps[-1]["epoch"]
            points = [(line["step"] / each, line["loss"]) for line in _thinned(steps)]
            yield chart(f"loss-{phase}", f"{title}: loss", "", [Series("msa", points)], ("epoch", ""))
        if ends:
            name = quality_of(ends[0])[0]
            found = [(line["epoch"], line[name]) for line in ends]
            hover = [f"epoch {line['epoch']}: {name} {said(*quality_of(line))}" for line in ends]
            series = [Series("msa", found, "on validation images", hover=hover)]
            dense = contents.summary.get("dense", {}).get(name)
            if dense is not None and phase != "dense" and len(ends) > 1:
                level = [(found[0][0], dense), (found[-1][0], dense)]
                series.append(Series("soft", level, "the dense model", style="dashed"))
            yield chart(f"{name}-{phase}", f"{title}: {name}", "", series, ("epoch", ""), percent=True)


def _thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return lines[:: -(-len(lines) // MOST_POINTS) or 1]


def _gates(contents: Contents) -> Iterator[Picture]:
    """Yield what the gates of a search left open, and what that cost, over its steps."""
    lines = _thinned(
        [line for line in contents.lines if line.get("phase") == "search" and "step" in line and "kinds" in line]
    )
    if len(lines) < 2:
        return
    steps, low = [line["step"] for line in lines], [0.0] * len(lines)
    areas = []
    for kind in KINDS:
        high = [below + line["kinds"].get(kind, 0) for below, line in zip(low, lines)]
        if high != low:
            areas.append(Series(kind, [*zip(steps, high), *reversed([*zip(steps, low)])], NAMES[kind], "area"))
        low = high
    ends = {"x": (steps[0], steps[-1])}
    says = "How many blocks the gates leave at each kind."
    yield chart("kinds", "Kinds of layers over the search", says, areas, ("step", ""), y=(0.0, max(low)), **ends)
    lines_of = [
        Series("msa", [(line["step"], line["cost"]) for line in lines], "expected cost"),
        Series("ink", [(line["step"], line["target"]) for line in lines], "budget", style="dashed"),
    ]
    yield chart(
        "cost", "Cost over the search", "As a share of the dense network.", lines_of, ("step", ""), percent=True, **ends
    )
