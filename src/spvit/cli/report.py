"""`spvit report`: a page about a run, and the same at the end of `spvit compress`."""

from __future__ import annotations

from importlib.util import find_spec

from rich.console import Console
from torch import nn

from spvit.cli.options import ReportCommand
from spvit.cli.show import say
from spvit.errors import SpvitError
from spvit.report import report
from spvit.train.run_folder import RunFolder


def report_command(options: ReportCommand, console: Console) -> None:
    """Write the page and say where it is."""
    with Console(stderr=True, quiet=console.quiet).status(f"reading {options.run}"):
        path = report(options.run, options.output, images=options.images, svg=options.svg, png=options.png)
    pictures = [kind for kind, asked in (("svg", options.svg), ("png", options.png)) if asked]
    beside = f"; pictures beside it: {path.stem}-*.{', *.'.join(pictures)}" if pictures else ""
    say(console, f"page in {path}{beside}")


def report_at_the_end(folder: RunFolder, host: nn.Module, console: Console) -> None:
    """Write the page about a run that has just ended, where the extra is installed; nothing of it fails the run."""
    if find_spec("jinja2") is None:
        say(console, f"for a page about this run: pip install 'spvit[report]', then spvit report {folder.path}")
        return
    try:
        with Console(stderr=True, quiet=console.quiet).status("writing the page"):
            path = report(folder.path, host=host)
        say(console, f"page about this run: {path}")
    except SpvitError as error:
        say(console, f"no page about this run: {error}")
