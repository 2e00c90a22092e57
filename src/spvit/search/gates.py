"""Bernoulli gates with straight-through gradients, nested gates, expectations, and one draw a step for a network.

Shapes: logits, noise and gates of one module are [gates]; p = sigmoid(logits) is the probability of being open.
This file knows nothing of attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

INITIAL_LOGIT = 1.5  # theta in the paper


def log_odds(uniform: Tensor) -> Tensor:
    """Return logit(u), the logistic noise of a draw. uniform: any shape, in [0, 1); at 0 the gate is surely closed."""
    return torch.log(uniform) - torch.log1p(-uniform)


def straight_through(logits: Tensor, noise: Tensor) -> Tensor:
    """Return sampled gates: 0 or 1 in value, with the gradient of the soft sample (paper section 3.3).

    noise: the log odds of a uniform draw.
    """
    sample = noise + logits
    soft = torch.sigmoid(sample)
    return (sample > 0).to(soft.dtype) + soft - soft.detach()


def is_open(logits: Tensor) -> Tensor:
    """Return, as booleans, which gates are open in evaluation: p > 0.5."""
    return logits > 0


def expected(logits: Tensor) -> Tensor:
    """Return the gates that enter the cost: 1[p > 0.5] in value, with the gradient of sigmoid(p - 0.5)."""
    soft = torch.sigmoid(torch.sigmoid(logits) - 0.5)
    return is_open(logits).to(soft.dtype) + soft - soft.detach()


def nest(gates: Tensor) -> Tensor:
    """Return cumulative products along the last axis: a costlier choice needs every cheaper gate open.

    Where a choice and the next costlier one are both open, the cheaper is detached, which slows the cheap gates down
    (paper section 3.3). gates: [..., gates], each 0 or 1 in value.

    For example three gates 1, 1, 0 give 1, 1, 0: two are open, so the choice is the second, and the first is detached.
    """
    nested = torch.cumprod(gates, dim=-1)
    taken_over = nested[..., 1:] > 0.5
    kept_back = torch.where(taken_over, nested[..., :-1].detach(), nested[..., :-1])
    return torch.cat([kept_back, nested[..., -1:]], dim=-1)


def opened(bits: Sequence[bool]) -> int:
    """Return how many of the nested gates are open, counted from the cheapest to the first that is closed."""
    for index, bit in enumerate(bits):
        if not bit:
            return index
    return len(bits)


class GateDraws:
    """Draws the gates of a whole network once a forward pass, so that a step needs at most one device sync.

    The first gated module in training mode draws for all when it runs. Every gated module holds the same instance;
    it is not a module itself.
    The default random generator of the gates' device is used, so seeding and saving that one makes a run repeatable
    and re-computation under activation checkpointing sees the same gates.
    """

    def __init__(self) -> None:
        self.members: list[Any] = []
        self.counted: list[Any] = []
        self._fixed: Tensor | None = None
        self._noise: dict[int, Tensor] = {}
        self._bits: dict[int, tuple[bool, ...]] = {}

    def join(self, member: nn.Module, read_bits: bool) -> None:
        """Add a gated module (it has `gate_logits`). With `read_bits`, its gates are also wanted as Python booleans."""
        self.members.append(member)
        if read_bits:
            self.counted.append(member)

    def fix_uniforms(self, uniforms: Tensor | None) -> None:
        """Use these uniforms, [all gates in the order of the network], in place of fresh ones; None draws again."""
        total = sum(member.gate_logits.numel() for member in self.members)
        if uniforms is not None and uniforms.shape != (total,):
            raise ValueError(f"uniforms have shape {tuple(uniforms.shape)}, expected ({total},): one a gate")
        self._fixed = uniforms

    @torch.no_grad()
    def _draw(self) -> None:
        logits = [member.gate_logits for member in self.members]
        sizes, like = [len(item) for item in logits], logits[0]
        uniforms = torch.rand(sum(sizes), device=like.device) if self._fixed is None else self._fixed.to(like.device)
        noises = log_odds(uniforms).to(like.dtype).split(sizes)
        self._noise = dict(zip(map(id, self.members), noises))
        samples = [self._noise[id(member)] + member.gate_logits for member in self.counted]
        bits = iter((torch.cat(samples) > 0).tolist() if samples else [])
        self._bits = {id(member): tuple(itertools.islice(bits, len(own))) for member, own in zip(self.counted, samples)}

    def noise(self, member: nn.Module) -> Tensor:
        """Return the noise of a module for this forward pass: [gates]. The first module in training draws for all."""
        first = next((other for other in self.members if other.training), member)
        if member is first or id(member) not in self._noise:
            self._draw()
        return self._noise[id(member)]

    def sampled_bits(self, member: nn.Module) -> tuple[bool, ...]:
        """Return the sampled gates as booleans. Ask for the noise first."""
        return self._bits[id(member)]

    def __getstate__(self) -> dict[str, Any]:
        # Draws are keyed by module identity, so copies and files leave them out and draw anew.
        return {**self.__dict__, "_noise": {}, "_bits": {}}
