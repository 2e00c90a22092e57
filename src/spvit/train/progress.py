"""Progress of a phase on the terminal: a bar with rate and time left, loss, budget, and layers by kind."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 5.0


class PhaseProgress:
    """Shows one phase after another on a console; on None it shows nothing.

    A terminal gets a live bar too; epochs are reported at most every few seconds, and the last one always.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._name = self._standing = ""
        self._reported = -math.inf

    @contextmanager
    def bar(self, name: str, steps: int, done: int = 0) -> Iterator[None]:
        """Show a phase of so many steps, of which some are done already, while it runs."""
        self._name, self._standing = name, ""
        if self.console is not None and self.console.is_terminal:
            columns = ("[bold]{task.description}", BarColumn(bar_width=24), MofNCompleteColumn(), "{task.fields[rate]}")
            more = (TimeRemainingColumn(), "{task.fields[text]}")
            self._bar = Progress(*columns, *more, console=self.console, transient=True)
            self._bar.add_task(name, total=steps, completed=done, text="", rate="")
            self._bar.start()
        try:
            yield
        finally:  # a bar left running would hide the terminal's cursor under the message of what went wrong
            if self._bar is not None:
                self._bar.stop()
            self._bar = None

    def step(self, losses: dict[str, float] | None = None) -> None:
        """Count one step, with its losses by name."""
        if self._bar is None:
            return
        [task] = self._bar.tasks
        losses = losses or {}
        text = f"loss {losses['loss']:.3f}" if "loss" in losses else ""
        budget = f"  budget loss {losses['budget_loss']:.3g}" if "budget_loss" in losses else ""
        rate = f"{task.speed:.1f} steps/s" if task.speed and losses else ""
        self._bar.update(task.id, advance=1, text=f"{text}{budget}  {self._standing}", rate=rate)

    def stand(self, standing: dict[str, Any]) -> None:
        """Say how a search stands now: the expected cost against the target, and the layers at each kind."""
        if "cost" in standing:
            kinds = " ".join(f"{kind} {count}" for kind, count in standing["kinds"].items())
            self._standing = f"cost {standing['cost']:.1%} (target {standing['target']:.1%})  {kinds}"

    def epoch(self, epoch: int, epochs: int, accuracy: float) -> None:
        """Report the end of an epoch."""
        now = time.monotonic()
        if epoch == epochs or now - self._reported >= SECONDS_BETWEEN_LINES:
            self._reported = now
            self.note(f"{self._name} epoch {epoch}/{epochs}: accuracy {accuracy:.2%}  {self._standing}".rstrip())

    def note(self, text: str) -> None:
        """Print one line."""
        if self.console is not None:
            self.console.print(text, highlight=False, soft_wrap=True)
