"""The processes that a run has."""

from datetime import timedelta

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def processes() -> PartialState:
    """Return the state that this process shares with the others of its run."""
    # Made by itself it overlooks that Accelerate's launcher asks for the CPU, which an Accelerator would see.
    # The others wait for the one that scores, which takes minutes for a large model.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(hours=6))
