"""Tables for the terminal: a network block by block, and dense against pruned."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from spvit.architecture import KINDS, Architecture
from spvit.benchmark import Latency
from spvit.budget import human
from spvit.cost import NetworkCost
from spvit.train.loop import Evaluation


def say(console: Console, *lines: str) -> None:
    """Print lines as they are, without colours or breaks."""
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def block_table(architecture: Architecture, costs: dict[str, NetworkCost], title: str) -> Table:
    """Return a table by block: attention, FFN units, and params and MACs beside the dense ones, with totals.

    Args:
        architecture: what is kept.
        costs: the host's costs by metric.
        title: heading.
    """
    table = Table("block", "attention", title=title, title_justify="left")
    for name in ("FFN units", "params", "dense params", "macs", "dense macs"):
        table.add_column(name, justify="right")
    by_metric = [costs["params"], costs["macs"]]
    for index, block in enumerate(architecture.blocks):
        own = [cost.blocks[index] for cost in by_metric]
        cells = [human(count) for cost in own for count in (cost.of(block, architecture.rules), cost.dense)]
        table.add_row(str(index), str(block.attention), f"{len(block.ffn.units)}/{block.ffn.width}", *cells)
    table.add_row("", "rest", "", *(human(cost.fixed) for cost in by_metric for _ in range(2)), end_section=True)
    totals = [human(count) for cost in by_metric for count in (cost.of(architecture), cost.dense)]
    table.add_row("", "total", "", *totals)
    shares = [f"{cost.of(architecture) / cost.dense:.1%}" for cost in by_metric]
    table.add_row("", "share", "", shares[0], "", shares[1], "")
    return table


def kinds_text(architecture: Architecture) -> str:
    """Return how many layers are of each kind, in words, narrowed ones apart."""
    found = ["narrow msa" if block.attention.narrowed() else block.attention.kind for block in architecture.blocks]
    return ", ".join(f"{found.count(kind)} {kind}" for kind in ("msa", "narrow msa", *list(KINDS)[1:]) if kind in found)


def latency_text(latency: Latency) -> str:
    """Return a latency with all that it was measured with."""
    return (
        f"{latency.latency_ms:.2f} ms (spread {latency.spread_ms:.2f}) at batch {latency.batch}, "
        f"{latency.images_per_s:.0f} images/s, {latency.device}, {latency.dtype}, {latency.threads} threads, "
        f"{latency.repeats} repeats"
    )


def comparison_table(
    figures: dict[str, Evaluation],
    costs: dict[str, dict[str, int]],
    latencies: dict[str, list[Latency]],
) -> Table:
    """Return models side by side: accuracy, params, MACs, and latency by batch size; all arguments are by row name."""
    table = Table("")
    batches = [f"latency, batch {latency.batch}" for latency in next(iter(latencies.values()))]
    for name in ("accuracy", "params", "macs", *batches):
        table.add_column(name, justify="right")
    for name, figure in figures.items():
        counts = [human(costs[name][metric]) for metric in ("params", "macs")]
        measured = [f"{latency.latency_ms:.2f} ms" for latency in latencies[name]]
        table.add_row(name, f"{figure.accuracy:.2%}", *counts, *measured)
    return table
