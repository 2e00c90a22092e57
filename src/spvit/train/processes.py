"""The processes of a run: what they share, and what the first does for all."""

from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env, reduce

from spvit.errors import RunError


def processes() -> PartialState:
    """Return the state that this process shares with the others of its run."""
    # Made by itself it overlooks that Accelerate's launcher asks for the CPU, which an Accelerator would see.
    # The others wait for the one that scores, which takes minutes for a large model.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(hours=6))


def make_accelerator() -> Accelerator:
    """Return the Accelerator of a run: any device, any number of processes."""
    processes()
    # Accelerate keeps one precision a process, but a later run may ask for another: autocast is ours.
    return Accelerator(mixed_precision="no")


def summed(*values: float) -> list[float]:
    """Return of each value the sum over all processes, which then act on it alike."""
    state = processes()
    if state.num_processes == 1:
        return list(values)
    found: list[float] = reduce(torch.tensor(values, device=state.device), "sum").tolist()
    return found


def by_the_first(work: Callable[[], object]) -> None:
    """Let the first process work while the others wait; when it fails they raise RunError with its message."""
    failure: list[str | None] = [None]
    if processes().is_main_process:
        try:
            work()
        except Exception as error:  # whatever it is, the others must not wait on
            broadcast_object_list([str(error) or type(error).__name__])
            raise
    broadcast_object_list(failure)
    if failure[0] is not None:
        raise RunError(f"the first process failed: {failure[0]}")
