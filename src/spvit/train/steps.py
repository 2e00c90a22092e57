"""What a step of training is made of: batches in groups, and a compiled forward pass."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from spvit.errors import RunError


def groups(batches: Iterable[Any], size: int) -> Iterator[Iterable[Any]]:
    """Yield batches in groups of a size, each to be gone through before the next one; none is read ahead."""
    stream = iter(batches)
    for first in stream:
        yield chain((first,), islice(stream, size - 1))


def compiled(model: nn.Module) -> Callable[[Tensor], Any]:
    """Return a model's forward pass, compiled when it is first called; the model itself stays as it is.

    It raises RunError when torch.compile fails, for want of a C++ compiler or for what the model does.
    """
    run = torch.compile(model)

    def forward(images: Tensor) -> Any:
        try:
            return run(images)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).partition("\n\n")[0].split())
            raise RunError(f"torch.compile failed: {reason}; leave out --compile") from error

    return forward
