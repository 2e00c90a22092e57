"""Progress of a phase on the terminal: a bar with rate and time left, loss, budget, and layers by kind."""

from __future__ import annotations

import math
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


def standing_text(standing: dict[str, Any]) -> str:
    """Return a search's standing in one line: the expected cost against the target, and the layers at each kind."""
    if "cost" not in standing:
        return ""
    kinds = " ".join(f"{kind} {count}" for kind, count in standing["kinds"].items())
    return f"cost {standing['cost']:.1%} (target {standing['target']:.1%})  {kinds}"


class PhaseProgress:
    """Shows one phase after another on a console; on None it shows nothing.

    A terminal gets a live bar too; epochs are reported at most every few seconds, and the last one always.
    """

    SECONDS_BETWEEN_LINES = 5.0

    def __init__(self, console: Console | None = None) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._name = ""
        self._standing = ""
        self._reported = -math.inf

    def start(self, name: str, steps: int, done: int) -> None:
        """Begin a phase of so many steps, of which some are done already."""
        self._name, self._standing = name, ""
        if self.console is None or not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(name, total=steps, completed=done, text="", rate="")

    def advance(self, loss: float, values: dict[str, float]) -> None:
        """Count one step with its figures."""
        if self._bar is None or self._task is None:
            return
        speed = self._bar.tasks[self._task].speed
        budget = f"  budget loss {values['budget_loss']:.3g}" if "budget_loss" in values else ""
        self.step(f"loss {loss:.3f}{budget}  {self._standing}", f"{speed:.1f} steps/s" if speed else "")

    def step(self, text: str, rate: str = "") -> None:
        """Count one step with a text beside the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, text=text, rate=rate)

    def stand(self, standing: dict[str, Any]) -> None:
        """Say how a search stands now."""
        self._standing = standing_text(standing)

    def epoch(self, epoch: int, epochs: int, accuracy: float) -> None:
        """Report the end of an epoch."""
        now = time.monotonic()
        if epoch < epochs and now - self._reported < self.SECONDS_BETWEEN_LINES:
            return
        self._reported = now
        line = f"{self._name} epoch {epoch}/{epochs}: accuracy {accuracy:.2%}"
        self.note(f"{line}  {self._standing}".rstrip())

    def note(self, text: str) -> None:
        """Print one line."""
        if self.console is not None:
            self.console.print(text, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """End the phase."""
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._task = None, None
