"""Tables for the terminal: a network block by block, and dense against pruned."""

from __future__ import annotations

from rich.table import Table

from spvit.architecture import KINDS, Architecture
from spvit.benchmark import Latency
from spvit.budget import human
from spvit.cost import NetworkCost
from spvit.train.loop import Evaluation


def block_table(architecture: Architecture, costs: dict[str, NetworkCost], title: str) -> Table:
    """Return a table by block: attention, FFN units, params and MACs, pruned beside dense, with totals.

    Args:
        architecture: what is kept.
        costs: the host's costs by metric.
        title: heading.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("block", justify="right")
    table.add_column("attention")
    for name in ("FFN units", "params", "dense params", "macs", "dense macs"):
        table.add_column(name, justify="right")
    for index, block in enumerate(architecture.blocks):
        row = []
        for metric in ("params", "macs"):
            cost = costs[metric].blocks[index]
            kept = cost.of(block, architecture.rules)
            row += [human(kept), human(cost.dense)]
        units = f"{len(block.ffn.units)}/{block.ffn.width}"
        table.add_row(str(index), str(block.attention), units, *row)
    fixed = [human(costs[metric].fixed) for metric in ("params", "params", "macs", "macs")]
    table.add_row("", "rest", "", *fixed, end_section=True)
    totals = []
    for metric in ("params", "macs"):
        totals += [human(costs[metric].of(architecture)), human(costs[metric].dense)]
    table.add_row("", "total", "", *totals)
    shares = [f"{costs[metric].of(architecture) / costs[metric].dense:.1%}" for metric in ("params", "macs")]
    table.add_row("", "share", "", shares[0], "", shares[1], "")
    return table


def kinds_text(architecture: Architecture) -> str:
    """Return how many layers are of each kind, in words, narrowed ones apart."""
    found = ["narrow msa" if block.attention.narrowed() else block.attention.kind for block in architecture.blocks]
    return ", ".join(f"{found.count(kind)} {kind}" for kind in ("msa", "narrow msa", *list(KINDS)[1:]) if kind in found)


def comparison_table(
    figures: dict[str, Evaluation],
    costs: dict[str, dict[str, int]],
    latencies: dict[str, list[Latency]],
) -> Table:
    """Return dense against pruned: accuracy, params, MACs, and latency by batch size.

    Args:
        figures: by row name.
        costs: by row name, `params` and `macs`.
        latencies: by row name, one a batch size.
    """
    table = Table()
    table.add_column("")
    for name in ("accuracy", "params", "macs"):
        table.add_column(name, justify="right")
    for latency in next(iter(latencies.values())):
        table.add_column(f"latency, batch {latency.batch}", justify="right")
    for name, figure in figures.items():
        measured = [f"{latency.latency_ms:.2f} ms" for latency in latencies[name]]
        cost = costs[name]
        table.add_row(name, f"{figure.accuracy:.2%}", human(cost["params"]), human(cost["macs"]), *measured)
    return table
