"""The processes of a run: what they share, and what the first does for all."""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, parse_flag_from_env, reduce

from spvit.errors import DataError, RunError
from spvit.models import device_named

SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""Ways of a launcher to give each process a part of the model."""


def processes(cpu: bool = False) -> PartialState:
    """Return the state that this process shares with the others of its run; the first call may ask for the CPU."""
    # Made by itself it overlooks that Accelerate's launcher asks for the CPU, which an Accelerator would see.
    # The others wait for the one that scores, which takes minutes for a large model.
    # Several without an accelerator would each take itself for the only one.
    cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=timedelta(hours=6))


def use_device(name: str | None) -> None:
    """Let the models of this process run on a device such as `cuda:1`; None takes the accelerator, or else the CPU.

    Raises ModelError when it is not there, and DataError when several processes cannot have it, or their launcher asks
    for what would not come about.
    """
    for part in SHARDING:
        if parse_flag_from_env(f"ACCELERATE_USE_{part}"):
            why = "states hold the whole model, and none was gathered from shards yet"
            raise DataError(f"the launcher asks for {part}, which spvit cannot train with: {why}; launch without it")
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
