"""`spvit push`: a model of spvit's goes to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from spvit.cli.options import PushCommand
from spvit.cli.show import say
from spvit.pages.card import check_loads, model_card, push


def push_command(options: PushCommand, console: Console) -> None:
    """Upload a model, and say where it is; or print its card."""
    if options.dry_run:
        check_loads(Path(options.run))
        card = model_card(options.run, options.name, options.license, options.base_model)
        console.print(card, markup=False, highlight=False, soft_wrap=True)  # it holds brackets
        return
    given = {name: value for name, value in vars(options).items() if name not in ("run", "name", "dry_run")}
    with console.status(f"uploading {options.run}"):
        name = push(options.run, options.name, **given)
    say(console, f'{options.run} is on the hub; load the model with spvit.load("{name}")')
