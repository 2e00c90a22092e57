"""Tables for the terminal: a network block by block, and dense against pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Column, Table

from spvit.architecture import KINDS, Architecture
from spvit.budget import human
from spvit.cost import NetworkCost
from spvit.speed.benchmark import Latency
from spvit.train.compress import Compressed


def say(console: Console, *lines: str) -> None:
    """Print lines as they are, without colours or breaks."""
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False, emoji=False)


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
    """Return latency and throughput by batch size and model, each against the first model, with the settings below."""
    table = Table("batch", Column("model", overflow="fold"), *right("ms", "images/s", "speed-up (95 %)"))
    names = list(latencies)
    for same_batch in zip(*latencies.values()):
        for index, (name, own) in enumerate(zip(names, same_batch)):
            figures = f"{own.latency_ms:.2f} ± {own.spread_ms:.2f}", f"{own.images_per_s:.0f}"
            table.add_row(str(own.batch), name, *figures, speed_text(own) if index else "")
        table.add_section()
    every = [latency for own in latencies.values() for latency in own]
    where = {f"{latency.device} {latency.dtype} {latency.backend}": None for latency in every}
    threads, rounds = every[0].threads, min(latency.repeats for latency in every)
    settings = f"{threads} thread{'s'[: threads != 1]}; {rounds} rounds or more, in turns; ± interquartile range"
    table.caption, table.caption_justify = f"{', '.join(where)}; {settings}; speed-up over {names[0]}", "left"
    return table


def speed_text(latency: Latency) -> str:
    """Return how many times as fast as the first of its run a model is, and whether that is noise."""
    low, high = latency.speed_up_range
    return f"{latency.speed_up:.2f}x ({low:.2f}-{high:.2f}){' noise' if latency.within_noise else ''}"


def comparison_table(result: Compressed, costs: dict[str, NetworkCost]) -> Table:
    """Return dense and pruned side by side: accuracy or agreement, params and MACs."""
    table = Table("", *right(result.dense.judged_by, "params", "macs"))
    for name, figures in (("dense", result.dense), ("pruned", result.pruned)):
        by_metric = [costs["params"], costs["macs"]]
        counts = [cost.dense if name == "dense" else cost.of(result.architecture) for cost in by_metric]
        table.add_row(name, figures.written, *map(human, counts))
    return table


def right(*names: str) -> list[Column]:
    """Return columns of numbers."""
    return [Column(name, justify="right") for name in names]
