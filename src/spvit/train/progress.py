"""Progress of a phase on the terminal: a bar with rate and time left, loss, budget, and layers by kind."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from spvit.hosts.walk import Report

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_STEPS = 30.0
"""Between lines within an epoch, where there is no bar."""


class PhaseProgress:
    """Shows one phase after another on a console, or nothing on None; a terminal gets a live bar too.

    A function to report to gets every step with its losses, and every epoch with the figures of its evaluation.
    """

    def __init__(self, console: Console | None = None, report: Report | None = None) -> None:
        self.console = console
        self.report = report
        self._name = self._standing = ""
        self._reported = self._shown = -math.inf

    @contextmanager
    def bar(self, name: str, steps: int, done: int = 0) -> Iterator[None]:
        """Show a phase of so many steps, of which some are done already, while it runs."""
        self._name, self._standing = name, ""
        self._shown = self._started = time.monotonic()
        self._first = done
        columns = ("[bold]{task.description}", BarColumn(bar_width=24), MofNCompleteColumn(), "{task.fields[rate]}")
        more = (TimeRemainingColumn(), "{task.fields[text]}")
        hidden = self.console is None or not self.console.is_terminal
        with Progress(*columns, *more, console=self.console, transient=True, disable=hidden) as self._bar:
            self._task = self._bar.add_task(name, total=steps, completed=done, text="", rate="")
            yield

    def step(self, losses: dict[str, float] | None = None) -> None:
        """Count one step; of training with the losses by name that are known last."""
        trains, losses, speed = losses is not None, losses or {}, self._bar.tasks[0].speed
        shown = [f"{name.replace('_', ' ')} {losses[name]:.3g}" for name in ("loss", "budget_loss") if name in losses]
        rate = f"{speed:.1f} steps/s" if speed and trains else ""
        text = "  ".join([*shown, self._standing])
        self._bar.update(self._task, advance=1, text=text, rate=rate)
        now, task = time.monotonic(), self._bar.tasks[0]
        if self._bar.disable and now - self._shown >= SECONDS_BETWEEN_STEPS:
            self._shown = now
            done, total = int(task.completed), int(task.total or 0)
            left = timedelta(seconds=round((now - self._started) / (done - self._first) * (total - done)))
            self.note(f"{self._name} {done}/{total}: {left} left  {text}".rstrip())
        self._report(losses)

    def count(self, _: str, done: int, total: int, *figures: object) -> None:
        """Count one step of work that reports its own."""
        self._bar.update(self._task, total=total)
        self.step()

    def _report(self, figures: Mapping[str, float]) -> None:
        task = self._bar.tasks[0]
        if self.report is not None:
            self.report(self._name, int(task.completed), int(task.total or 0), dict(figures))

    def stand(self, standing: dict[str, Any]) -> None:
        """Say how a search stands now: the expected cost against the target, and the layers at each kind."""
        if "cost" in standing:
            kinds = " ".join(f"{kind} {count}" for kind, count in standing["kinds"].items())
            self._standing = f"cost {standing['cost']:.1%} (target {standing['target']:.1%})  {kinds}"

    def epoch(self, epoch: int, epochs: int, quality: str, figures: Mapping[str, float]) -> None:
        """Report the end of an epoch; print a line of it at most every few seconds, and of the last one always."""
        self._report(figures)
        now = time.monotonic()
        if epoch == epochs or now - self._reported >= SECONDS_BETWEEN_LINES:
            self._reported = now
            self.note(f"{self._name} epoch {epoch}/{epochs}: {quality}  {self._standing}".rstrip())

    def note(self, text: str) -> None:
        """Print one line."""
        if self.console is not None:
            self.console.print(text, highlight=False, soft_wrap=True)
