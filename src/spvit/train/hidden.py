"""Hidden states, the tokens that blocks take: how far a model's are from the dense model's while it is distilled.

Shapes: [..., D], the same of both models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spvit.hosts.host import Host
from spvit.hosts.walk import entry_of

LEAST = 1e-3
"""Share of the mean variance that the variance of a dimension counts for at least."""


def hidden_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Return the squared error of hidden states over the variance of the wanted ones, by dimension: the mean of all."""
    errors = []
    for own, dense in zip(found, wanted, strict=True):
        dense = dense.float()
        variances = dense.flatten(0, -2).var(0, correction=0)  # of a batch
        scales = variances.clamp(min=LEAST * variances.mean()).clamp(min=torch.finfo(variances.dtype).tiny)
        errors.append(((own.float() - dense).square() / scales).mean())
    return torch.stack(errors).mean()


class HiddenStates:
    """What arrives at the blocks of a model and of its dense model, all blocks but the first, while it is kept."""

    def __init__(self, model: nn.Module, dense: Host) -> None:
        self.kept: tuple[list[Tensor], list[Tensor]] | None = None
        self._handles = [
            entry_of(host, index).register_forward_pre_hook(self._keeper(number), with_kwargs=True)
            for number, host in enumerate((dense.on(model), dense))
            for index in range(1, len(host.blocks))
        ]

    def _keeper(self, number: int) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.kept is not None:
                tokens = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
                self.kept[number].append(tokens.clone())  # some blocks add to their input in place

        return keep

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep those of one forward pass of each model inside the context."""
        self.kept = [], []
        try:
            yield
        finally:
            self.kept = None

    def error(self) -> Tensor:
        """Return the error of those that are kept, a scalar."""
        assert self.kept is not None
        return hidden_error(*self.kept)

    def close(self) -> None:
        """Leave the models as they were."""
        for handle in self._handles:
            handle.remove()
