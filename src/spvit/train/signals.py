"""SIGTERM and SIGUSR1, with which clusters announce a job's end, wait for a place where a run can be continued from."""

import atexit
import multiprocessing.util  # whose own function at exit then runs after ours
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


@contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the number of a signal that asks to stop, or 0 when none came.

    One that came and was not acted on is sent again at the end, to what was there to handle it before. Only the main
    thread gets signals; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in STOPPING}
    try:
        yield lambda: came[0] if came else 0
    except BaseException:
        came.clear()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            os.kill(os.getpid(), came[0])


@contextmanager
def time_limit(hours: float | None, say: Callable[[str], None]) -> Iterator[None]:
    """Send SIGTERM to this process when so many hours are over; None never does."""

    def end() -> None:
        say(f"max-hours: {hours:g} are over")
        os.kill(os.getpid(), signal.SIGTERM)

    timer = threading.Timer(3600 * (hours or 0), end)
    timer.daemon = True
    if hours is not None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@atexit.register
def _end_workers() -> None:
    """Kill workers that an error left behind, before Python's own end of them by SIGTERM, which they ignore."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def ignored_by_workers(worker: int) -> None:
    """Leave signals that are sent to all processes at once to the one that the workers read images for."""
    for number in (signal.SIGINT, *STOPPING):
        signal.signal(number, signal.SIG_IGN)
