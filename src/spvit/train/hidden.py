"""Hidden states, the tokens that blocks take: how far a model's are from the dense model's while it is distilled.

Shapes: [..., D], the same of both models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spvit.hosts.calling import in_mode, tokens_given
from spvit.hosts.host import Host
from spvit.hosts.walk import entry_of

LEAST = 1e-3
"""Share of the mean variance that the variance of a dimension counts for at least."""


def scales_of(tokens: Tensor) -> Tensor:
    """Return what squared errors of hidden states are divided by: the variance of each dimension, [D]."""
    variances = tokens.float().flatten(0, -2).var(0, correction=0)
    return variances.clamp(min=LEAST * variances.mean()).clamp(min=torch.finfo(variances.dtype).tiny)


def hidden_error(found: Sequence[Tensor], wanted: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """Return the squared error of hidden states over scales by dimension, the mean of all."""
    errors = [
        ((own.float() - dense.float()).square() / scale).mean()
        for own, dense, scale in zip(found, wanted, scales, strict=True)
    ]
    return torch.stack(errors).mean()


class HiddenStates:
    """What arrives at the blocks of a model and of its dense model, all blocks but the first, while it is kept."""

    def __init__(self, model: nn.Module, dense: Host, images: Tensor) -> None:
        """images: of which the dense model's hidden states say how much each dimension varies."""
        self.kept: tuple[list[Tensor], list[Tensor]] | None = None
        self._handles = [
            entry_of(host, index).register_forward_pre_hook(self._keeper(number), with_kwargs=True)
            for number, host in enumerate((dense.on(model), dense))
            for index in range(1, len(host.blocks))
        ]
        # Not of each batch: processes, and batches whose gradients add up, would each have scales of their own.
        with self.keeping() as kept, in_mode(False, dense.model), torch.no_grad():
            dense.model(images)
            self._scales = [scales_of(tokens) for tokens in kept[1]]

    def _keeper(self, number: int) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.kept is not None:
                self.kept[number].append(tokens_given(args, kwargs).clone())  # some blocks add to their input in place

        return keep

    @contextmanager
    def keeping(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Keep those of one forward pass of each model inside the context."""
        self.kept = [], []
        try:
            yield self.kept
        finally:
            self.kept = None

    def error(self) -> Tensor:
        """Return the error of those that are kept, a scalar."""
        assert self.kept is not None
        return hidden_error(*self.kept, self._scales)

    def close(self) -> None:
        """Leave the models as they were."""
        for handle in self._handles:
            handle.remove()
