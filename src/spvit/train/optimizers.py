"""The optimizers of a phase, and how fast its gates move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from spvit.checkpoint import fit_state, plain_state
from spvit.models import undecayed
from spvit.search.network import gate_parameters
from spvit.train.settings import PhaseConfig

PUBLISHED_GATE_TRAVEL = 12.5  # learning rate 1e-3 over 10 epochs of 1,250 steps (paper section 4)
LARGEST_GATE_LEARNING_RATE = 0.05


def optimizers(model: nn.Module, settings: PhaseConfig, gated: bool, steps: int) -> tuple[Optimizer, Optimizer | None]:
    """Return AdamW for the weights, and a second one for the gate logits of a search.

    Args:
        model: what is trained.
        settings: of the phase.
        gated: whether the gates are trained too.
        steps: of the whole phase.
    """
    gates = gate_parameters(model) if gated else []
    own = {id(parameter) for parameter in gates}
    groups = param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=undecayed(model))
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
    weights = AdamW(groups, lr=settings.learning_rate)
    if not gates:
        return weights, None
    return weights, AdamW(gates, lr=gate_learning_rate(settings, steps), weight_decay=0.0)


def tensors_of(part: nn.Module | Optimizer) -> dict[str, Tensor]:
    """Return a model's weights, or an optimizer's moments and steps under `INDEX.NAME`, on the CPU.

    An optimizer's other settings are those of the phase.
    """
    if isinstance(part, nn.Module):
        return plain_state(part)
    states: dict[int, dict[str, Tensor]] = part.state_dict()["state"]
    return {f"{index}.{name}": value.cpu() for index, state in states.items() for name, value in state.items()}


def load_tensors(part: nn.Module | Optimizer, tensors: Mapping[str, Tensor], name: str) -> None:
    """Put back what `tensors_of` returned. Raises CheckpointError when it does not fit; `name` is for the message."""
    if isinstance(part, nn.Module):
        fit_state(part, tensors, name)
        return
    states: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, _, own = key.partition(".")
        states.setdefault(int(index), {})[own] = value
    part.load_state_dict({"state": states, "param_groups": part.state_dict()["param_groups"]})


def gate_learning_rate(settings: PhaseConfig, steps: int) -> float:
    """Return the constant learning rate of the gate logits in a search of so many steps."""
    rate: float | None = getattr(settings, "gate_learning_rate", None)
    return rate if rate is not None else min(PUBLISHED_GATE_TRAVEL / steps, LARGEST_GATE_LEARNING_RATE)
