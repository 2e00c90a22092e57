"""Tables for the terminal: a network block by block, and dense against pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Column, Table

from spvit.architecture import KINDS, Architecture
from spvit.benchmark import Latency
from spvit.budget import human
from spvit.cost import NetworkCost
from spvit.train.compress import Compressed


def say(console: Console, *lines: str) -> None:
    """Print lines as they are, without colours or breaks."""
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def block_table(architecture: Architecture, costs: dict[str, NetworkCost], title: str) -> Table:
    """Return a table by block: attention, FFN units, and params and MACs beside the dense ones, with totals."""
    numbers = right("FFN units", "params", "dense params", "macs", "dense macs")
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


def latency_table(latencies: Mapping[str, Sequence[Latency]]) -> Table:
    """Return latency and throughput by batch size and model, each against the first model, with all settings below."""
    first, every = next(iter(latencies)), [latency for own in latencies.values() for latency in own]
    threads, rounds = every[0].threads, min(latency.repeats for latency in every)
    settings = f"{threads} thread{'s'[: threads != 1]}, {rounds} rounds in turns or more; ± is the interquartile range"
    noise = "noise: within what a repeated run may differ by (95 % of the median), or below 1 %"
    table = Table("batch", "model", "runs on", *right("latency", "images/s"), f"speed against {first}")
    table.caption, table.caption_justify = f"{settings}; {noise}", "left"
    for same_batch in zip(*(zip([name] * len(own), own) for name, own in latencies.items())):
        for name, latency in same_batch:
            ms, rate = f"{latency.latency_ms:.2f} ± {latency.spread_ms:.2f} ms", f"{latency.images_per_s:.0f}"
            where = f"{latency.device}, {latency.dtype}, {latency.backend}"
            table.add_row(str(latency.batch), name, where, ms, rate, "" if name == first else speed_text(latency))
        table.add_section()
    return table


def speed_text(latency: Latency) -> str:
    """Return how fast a model is against the first of its run, in words where that is noise."""
    low, high = latency.speed_up_range
    found = f"{latency.speed_up:.2f}x ({low:.2f} to {high:.2f})"
    return f"{found}: noise" if latency.within_noise else found


def comparison_table(result: Compressed, costs: dict[str, NetworkCost]) -> Table:
    """Return dense and pruned side by side: accuracy or agreement, params and MACs."""
    table = Table("", *right(result.dense.words.split()[0], "params", "macs"))
    for name, figures in (("dense", result.dense), ("pruned", result.pruned)):
        by_metric = [costs["params"], costs["macs"]]
        counts = [cost.dense if name == "dense" else cost.of(result.architecture) for cost in by_metric]
        table.add_row(name, figures.words.split()[1], *map(human, counts))
    return table


def right(*names: str) -> list[Column]:
    """Return columns of numbers."""
    return [Column(name, justify="right") for name in names]
