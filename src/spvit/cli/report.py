"""`spvit report`: a page about a run, and the same at the end of `spvit compress`."""

from __future__ import annotations

from rich.console import Console
from torch import nn

from spvit.checkpoint import WEIGHTS, load
from spvit.cli.options import ReportCommand
from spvit.cli.show import say
from spvit.errors import SpvitError
from spvit.models import ModelConfig, open_model
from spvit.pages.page import report
from spvit.train.run_folder import RunFolder


def report_command(options: ReportCommand, console: Console) -> None:
    """Write the page and say where it is."""
    pictures = {"svg": options.svg, "png": options.png}
    with Console(stderr=True, quiet=console.quiet).status(f"reading {options.run}"):
        host, dense = None, RunFolder(options.run).dense
        if options.model is not None:
            host = open_model(ModelConfig(model=options.model), code=True).model
            host = load(dense, host=host) if (dense / WEIGHTS).is_file() else host
        path = report(options.run, options.output, host=host, images=options.images, **pictures)
    kinds = ", ".join(f"{path.stem}-*.{kind}" for kind, asked in pictures.items() if asked)
    say(console, f"page in {path}{f'; pictures beside it: {kinds}' if kinds else ''}")


def report_at_the_end(folder: RunFolder, host: nn.Module, console: Console) -> None:
    """Write the page about a run that has just ended; nothing of it fails the run."""
    try:
        with Console(stderr=True, quiet=console.quiet).status("writing the page"):
            path = report(folder.path, host=host)
        say(console, f"page about this run: {path}")
    except SpvitError as error:
        say(console, f"no page about this run: {error}; later: spvit report {folder.path}")
