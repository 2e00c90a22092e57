"""The processes of a run: what they share, and what the first does for all."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, parse_flag_from_env, reduce
from torch import nn

from spvit.errors import DataError, RunError, first_line
from spvit.models import device_named

SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""Ways of a launcher to give each process a part of the model."""

PATIENCE = timedelta(minutes=30)
"""For a process that does not come to where all of them exchange something."""
TURN, DONE = "spvit/turn", "done"


def processes(cpu: bool = False) -> PartialState:
    """Return the state that this process shares with the others of its run; the first call may ask for the CPU."""
    # Made by itself it overlooks that Accelerate's launcher asks for the CPU, which an Accelerator would see.
    # Several without an accelerator would each take itself for the only one.
    cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=PATIENCE)


def use_device(name: str | None) -> None:
    """Let the models of this process run on a device such as `cuda:1`; None takes the accelerator, or else the CPU.

    Raises ModelError when it is not there, and DataError when several processes cannot have it, or their launcher asks
    for what would not come about.
    """
    for part in SHARDING:
        if parse_flag_from_env(f"ACCELERATE_USE_{part}"):
            advice = "launch without it, and give --shard for parts of the model in each process"
            raise DataError(f"the launcher asks for {part}, which spvit cannot train with; {advice}")
    if (steps := os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) != "1":
        raise DataError(f"the launcher asks to add up {steps} gradients; give --images.accumulate {steps} instead")
    device = None if name is None else device_named(name)
    state = processes(name == "cpu")
    if state.num_processes > 1:
        if device is not None and (device.index is not None or device.type != state.device.type):
            own = f"each of the {state.num_processes} processes takes its own {state.device.type}"
            raise DataError(f"device is {name}, but {own}; leave the device out, or start one process")
        return
    before, chosen = state.device, name or os.environ.get("ACCELERATE_TORCH_DEVICE")
    if chosen is None and not torch.accelerator.is_available():
        chosen = "cpu"  # Accelerate decides for a GPU where a launcher started a single process
    state.device = torch.device(chosen) if chosen else None
    state.set_device()  # which decides where there is none
    if state.device != before:
        AcceleratorState._reset_state()  # or it remembers the device of a run before
    if state.device.index is not None:
        torch.accelerator.set_device_index(state.device.index)


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


def share_buffers(model: nn.Module) -> None:
    """Give all processes the first one's buffers: each has batch norms' statistics of its own images."""
    for buffer in model.buffers() if processes().num_processes > 1 else ():
        broadcast(buffer)


def by_the_first(work: Callable[[], object]) -> None:
    """Let the first process work while the others wait; when it fails they raise RunError with its message.

    They look every now and then, in no collective, so that the work may take hours and they hear signals meanwhile.
    """
    state = processes()
    if state.num_processes == 1:
        work()
        return
    store = _store()
    state.wait_for_everyone()  # until nothing is left of the turn before
    if state.is_main_process:
        try:
            work()
        except BaseException as error:  # whatever it is, the others must not wait on
            store.set(TURN, str(error) if isinstance(error, Exception) and str(error) else type(error).__name__)
            raise
        store.set(TURN, DONE)
    while not store.check([TURN]):
        time.sleep(0.02)
    if (failure := store.get(TURN).decode()) != DONE:
        raise RunError(f"the first process failed: {failure}")
    state.wait_for_everyone()
    if state.is_main_process:
        store.delete_key(TURN)


def _store() -> Any:
    """Return what all processes write keys to, that of the launcher where it has one."""
    return dist.distributed_c10d._get_default_store()


def who_is_gone(error: RuntimeError) -> str | None:
    """Return in words which process an error says has ended: another of the run, or one that reads images."""
    if str(error).startswith("DataLoader worker"):
        return f"a process that reads images has ended: {first_line(error)}"
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        return "another process of the run has ended, or cannot be reached"
    return None


def is_first_to_fail() -> bool:
    """Return whether this process is the first of its run to ask: one message is enough."""
    try:
        return not dist.is_initialized() or _store().add("spvit/failures", 1) == 1
    except RuntimeError:  # the process that has the store ended
        return True
