"""Tables for the terminal: a network block by block, and dense against pruned."""

from __future__ import annotations

from rich.console import Console
from rich.table import Column, Table

from spvit.architecture import KINDS, Architecture
from spvit.benchmark import Latency
from spvit.budget import human
from spvit.cost import NetworkCost
from spvit.train.compress import Compressed


def say(console: Console, *lines: str) -> None:
    """Print lines as they are, without colours or breaks."""
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False, emoji=False)


def block_table(architecture: Architecture, costs: dict[str, NetworkCost], title: str) -> Table:
    """Return a table by block: attention, FFN units, and params and MACs beside the dense ones, with totals."""
    numbers = _right("FFN units", "params", "dense params", "macs", "dense macs")
    table = Table("block", "attention", *numbers, title=title, title_justify="left")
    by_metric = [costs["params"], costs["macs"]]
    for index, block in enumerate(architecture.blocks):
        own = [cost.blocks[index] for cost in by_metric]
        cells = [human(count) for cost in own for count in (cost.of(block, architecture.rules), cost.dense)]
        attention = f"{block.attention}{'' if block.tokens == 'all' else ', prefix tokens alone'}"
        table.add_row(str(index), attention, f"{len(block.ffn.units)}/{block.ffn.width}", *cells)
    table.add_row("", "rest", "", *(human(cost.fixed) for cost in by_metric for _ in range(2)), end_section=True)
    totals = [(cost.of(architecture), cost.dense) for cost in by_metric]
    table.add_row("", "total", "", *(human(count) for pair in totals for count in pair))
    table.add_row("", "share", "", *(cell for own, whole in totals for cell in (f"{own / whole:.1%}", "")))
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


def comparison_table(result: Compressed, costs: dict[str, NetworkCost], latencies: dict[str, list[Latency]]) -> Table:
    """Return dense and pruned side by side: accuracy, params, MACs, and latency by batch size."""
    batches = (f"latency, batch {latency.batch}" for latency in latencies["dense"])
    table = Table("", *_right("accuracy", "params", "macs", *batches))
    for name, figures in (("dense", result.dense), ("pruned", result.pruned)):
        by_metric = [costs["params"], costs["macs"]]
        counts = [cost.dense if name == "dense" else cost.of(result.architecture) for cost in by_metric]
        measured = [f"{latency.latency_ms:.2f} ms" for latency in latencies[name]]
        table.add_row(name, f"{figures.accuracy:.2%}", *map(human, counts), *measured)
    return table


def _right(*names: str) -> list[Column]:
    return [Column(name, justify="right") for name in names]
