"""The optimizer of a phase: its groups, its learning rates, and its state as plain tensors."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.optim import Optimizer

from spvit.checkpoint import fit_state
from spvit.errors import DataError
from spvit.models import undecayed
from spvit.search.network import gate_parameters
from spvit.train.settings import PhaseConfig, SearchConfig
from spvit.train.shards import gathered, scattered

PUBLISHED_GATE_TRAVEL = 12.5  # learning rate 1e-3 over 10 epochs of 1,250 steps (paper section 4)
LARGEST_GATE_LEARNING_RATE = 0.05


def optimizer_of(model: nn.Module, settings: PhaseConfig, steps: int) -> Optimizer:
    """Return the optimizer of a phase of so many steps; a search trains the gate logits too, at a constant rate."""
    decay = settings.layer_decay
    if decay < 1 and not hasattr(model, "group_matcher"):
        raise DataError(f"layer_decay is {decay}, but only timm's models say which layer is which; leave it out")
    grouped: Any = param_groups_weight_decay if decay == 1 else partial(param_groups_layer_decay, layer_decay=decay)
    groups: list[dict[str, Any]] = grouped(model, settings.weight_decay, no_weight_decay_list=undecayed(model))
    if isinstance(settings, SearchConfig):
        gates, rate = gate_parameters(model), settings.gate_learning_rate
        own = {id(parameter) for parameter in gates}
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        rate = min(PUBLISHED_GATE_TRAVEL / steps, LARGEST_GATE_LEARNING_RATE) if rate is None else rate
        groups.append({"params": gates, "lr": rate, "weight_decay": 0.0, "gates": True, "use_fallback": True})
    return create_optimizer_v2(groups, settings.optimizer, lr=settings.peak_learning_rate)


def groups_of(optimizer: Optimizer, gates: bool = False) -> list[dict[str, Any]]:
    """Return the groups of an optimizer that are of weights, or those of gates, if they are trained."""
    return [group for group in optimizer.param_groups if group.get("gates", False) == gates]


def learning_rate_at(step: int, total: int, warmup: int, peak: float, minimum: float) -> float:
    """Return the learning rate of a step: linear warm-up from zero to the peak, then a cosine down to the minimum."""
    minimum = min(minimum, peak)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def tensors_of(part: nn.Module | Optimizer) -> dict[str, Tensor]:
    """Return a model's weights, or an optimizer's moments and steps under `INDEX.NAME`, as `gathered` does."""
    if isinstance(part, nn.Module):  # whose weights may share memory, which safetensors refuses
        return {name: value.clone() for name, value in gathered(part.state_dict()).items()}
    states: dict[int, dict[str, Tensor]] = part.state_dict()["state"]
    entries = ((f"{index}.{name}", value) for index, own in states.items() for name, value in own.items())
    # Muon also notes which parameters it takes, which it finds again.
    return gathered({name: value for name, value in entries if isinstance(value, Tensor)})


def load_tensors(part: nn.Module | Optimizer, tensors: Mapping[str, Tensor], name: str) -> None:
    """Put back what `tensors_of` returned. Raises CheckpointError naming `name` when a model's does not fit."""
    if isinstance(part, nn.Module):
        like = part.state_dict()
        fit_state(part, {key: scattered(value, like.get(key)) for key, value in tensors.items()}, name)
        return
    parameters = [parameter for group in part.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, _, own = key.partition(".")
        states.setdefault(int(index), {})[own] = scattered(value, parameters[int(index)])
    part.load_state_dict({"state": states, "param_groups": part.state_dict()["param_groups"]})
