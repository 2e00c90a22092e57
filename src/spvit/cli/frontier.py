"""`spvit frontier`: one scoring, many budgets, and what each costs and gives."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from spvit.budget import human
from spvit.cli.commands import open_run
from spvit.cli.options import FrontierCommand
from spvit.cli.report import report_at_the_end
from spvit.cli.show import latency_table, right, say
from spvit.train.frontier import run_frontier
from spvit.train.points import Frontier
from spvit.train.processes import processes


def frontier_command(options: FrontierCommand, console: Console) -> None:
    """Prune a model to every budget, and print the frontier."""
    host, run = open_run("frontier", options, False, console, unlabelled=True)
    found = run_frontier(host, options.budgets, options.metric, options, run)
    if not processes().is_main_process:
        return
    console.print(_table(found), latency_table({point.budget: point.latency for point in found.points}))
    folder, dense = run.folder.path, found.points[0]
    drawn = [f"frontier{suffix}" for suffix in (".svg", ".png") if (folder / f"frontier{suffix}").is_file()]
    say(
        console,
        f"{dense.judged_by} on {found.images:,} validation images; nothing was trained",
        f"files in {folder}: frontier.json, frontier.csv{''.join(f', {name}' for name in drawn)}",
        f'load a model with spvit.load("{folder}/{found.points[-1].folder}")',
    )
    report_at_the_end(run.folder, host, console)


def _table(found: Frontier) -> Table:
    """Return what every budget costs and gives."""
    dense = found.points[0]
    table = Table("budget", *right(dense.judged_by, "macs", "share", "params", "share", "seconds"))
    for point in found.points:
        counts = [(point.macs, dense.macs), (point.params, dense.params)]
        cells = [cell for own, whole in counts for cell in (human(own), f"{own / whole:.1%}")]
        seconds = found.seconds["scores"] if point is dense else point.seconds
        table.add_row(point.budget, point.written, *cells, f"{seconds:.1f}")
    table.caption = "seconds: of the dense model to score it, of a budget its share of the rest"
    table.caption_justify = "left"
    return table
