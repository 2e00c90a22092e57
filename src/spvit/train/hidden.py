"""Hidden states, the tokens that blocks take: how far a model's are from the dense model's while it is distilled.

Shapes: [..., D], the same of both models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spvit.hosts.calling import batch_first, in_mode, tokens_given
from spvit.hosts.host import Host
from spvit.hosts.sites import AttentionSite
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


def hooked(host: Host, keep: Callable[[Tensor], None]) -> list[RemovableHandle]:
    """Have a function called with what arrives at each block but the first, [B, ..., D], in their order.

    It takes a copy: some blocks add to their input in place.
    """

    def hook(site: AttentionSite, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(batch_first(site, tokens_given(args, kwargs)))

    return [
        entry_of(host, index).register_forward_pre_hook(partial(hook, block.attention), with_kwargs=True)
        for index, block in enumerate(host.blocks)
        if index > 0
    ]


class HiddenStates:
    """What arrives at the blocks of a model and of its dense model, all blocks but the first, while it is kept."""

    def __init__(self, model: nn.Module, dense: Host, images: Tensor) -> None:
        """images: of which the dense model's hidden states say how much each dimension varies."""
        self.kept: tuple[list[Tensor], list[Tensor]] | None = None
        hosts = enumerate((dense.on(model), dense))
        self._handles = [handle for number, host in hosts for handle in hooked(host, self._keeper(number))]
        # Not of each batch: processes, and batches whose gradients add up, would each have scales of their own.
        with self.keeping() as kept, in_mode(False, dense.model), torch.no_grad():
            dense.model(images)
            self._scales = [scales_of(tokens) for tokens in kept[1]]

    def _keeper(self, number: int) -> Callable[[Tensor], None]:
        def keep(tokens: Tensor) -> None:
            if self.kept is not None:
                self.kept[number].append(tokens.clone())

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
