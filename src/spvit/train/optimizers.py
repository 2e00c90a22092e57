"""The optimizers of a phase, and how fast its gates move."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW, Optimizer

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
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    names = {"bias", "position_embeddings", "cls_token", "mask_token"} | {name.split(".")[-1] for name in exempt}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            groups[parameter.dim() > 1 and name.split(".")[-1] not in names].append(parameter)
    weights = AdamW(
        [
            {"params": groups[True], "weight_decay": settings.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
    )
    if not gates:
        return weights, None
    return weights, AdamW(gates, lr=gate_learning_rate(settings, steps), weight_decay=0.0)


def gate_learning_rate(settings: PhaseConfig, steps: int) -> float:
    """Return the constant learning rate of the gate logits in a search of so many steps."""
    rate: float | None = getattr(settings, "gate_learning_rate", None)
    return rate if rate is not None else min(PUBLISHED_GATE_TRAVEL / steps, LARGEST_GATE_LEARNING_RATE)
