"""Passes images through a network block by block: what arrives at a module, what it gives, and the next block's input.

Shapes: B batch, N tokens = P prefix tokens + G grid tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from spvit.errors import CalibrationError
from spvit.hosts.base import BlockSites, Family
from spvit.moments import RIDGE

BATCH = 64


class _Reached(Exception):
    """Ends a forward pass early, with what was looked for."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def calibration_batches(images: Tensor | Iterable[Any], family: Family, host: nn.Module) -> list[Tensor]:
    """Return calibration images as batches [B, channels, height, width] on the host's device, in its dtype.

    Args:
        images: a tensor of images, or batches of them; of a batch that is a tuple or list, as loaders give, the first
            item counts.
        family: the host's.
        host: the model that takes them.

    Raises:
        CalibrationError: there are none, they are not of the size that the host takes, or not finite.
    """
    batches = images.split(BATCH) if isinstance(images, Tensor) else images
    parameter, size = next(host.parameters()), family.input_size(host)
    prepared = []
    for batch in batches:
        tensor = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(tensor, Tensor) or tuple(tensor.shape[1:]) != size:
            found = list(tensor.shape[1:]) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CalibrationError(
                f"calibration images are {found}, expected tensors of [batch, {', '.join(map(str, size))}] as the "
                "model takes them"
            )
        if not tensor.isfinite().all():
            raise CalibrationError("calibration images hold values that are not finite; check how they are read")
        if len(tensor):
            prepared.append(tensor.to(parameter))
    if not prepared:
        raise CalibrationError("there are no calibration images; give a few hundred or more")
    return prepared


@contextmanager
def where_float64_is(*models: nn.Module) -> Iterator[None]:
    """Have models on the CPU meanwhile that are on a device without float64, which MPS is."""
    some = [(model, next(model.parameters(), None)) for model in models]
    away = [(model, weight.device) for model, weight in some if weight is not None and weight.device.type == "mps"]
    for model, _ in away:
        model.cpu()
    try:
        yield
    finally:
        for model, home in away:
            model.to(home)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models in evaluation mode without gradients where float64 is, and back as they were at the end."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad(), where_float64_is(*models):
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def reached(run: nn.Module, x: Tensor, module: nn.Module, output: bool) -> Tensor:
    """Return the first input or the output [B, N, D] of a module inside one that is run on x; nothing after it runs."""

    def stop_before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args[0] if args else next(iter(kwargs.values())))

    def stop_after(module: nn.Module, args: Any, result: Any) -> None:
        raise _Reached(result[0] if isinstance(result, tuple) else result)

    if output:
        handle = module.register_forward_hook(stop_after)
    else:
        handle = module.register_forward_pre_hook(stop_before, with_kwargs=True)
    try:
        run(x)
    except _Reached as found:
        return found.value
    finally:
        handle.remove()
    raise CalibrationError(f"the model's {type(module).__name__} was not reached; its forward pass leaves it out")


def block_inputs(model: nn.Module, sites: BlockSites, batches: Iterable[Tensor]) -> list[Tensor]:
    """Return what a block takes, [B, N, D] a batch of images."""
    block = model.get_submodule(sites.path)
    return [reached(model, batch, block, output=False) for batch in batches]


def advance(model: nn.Module, sites: BlockSites, following: BlockSites | None, x: Tensor) -> Tensor:
    """Return the input of the following block from that of this one (of the last one: its output)."""
    out = model.get_submodule(sites.path)(x)
    out = out[0] if isinstance(out, tuple) else out
    between = following.before if following is not None else None
    return model.get_submodule(between)(out) if between is not None else out


@dataclass(frozen=True)
class Layer:
    """One block of the pruned model beside the dense one, with the inputs that each has: lists of [B, N, D]."""

    model: nn.Module
    host: nn.Module
    family: Family
    sites: BlockSites
    inputs: list[Tensor]
    dense_inputs: list[Tensor]
    ridge: float = RIDGE
    known: Mapping[str, list[Tensor]] = field(default_factory=dict)
    """What modules of the dense block give, by path, for those that need not run again."""

    def knowing(self, path: str) -> Layer:
        """Return the same layer that has run a module of the dense block once, for several fits to what it gives."""
        return replace(self, known={path: list(self.wanted(path))})

    def arriving(self, path: str) -> Iterator[Tensor]:
        """Yield what arrives at a module of the pruned block."""
        block, module = self.model.get_submodule(self.sites.path), self.model.get_submodule(path)
        return (reached(block, x, module, output=False) for x in self.inputs)

    def wanted(self, path: str) -> Iterator[Tensor]:
        """Yield what a module of the dense block gives."""
        if path in self.known:
            return iter(self.known[path])
        block, module = self.host.get_submodule(self.sites.path), self.host.get_submodule(path)
        return (reached(block, x, module, output=True) for x in self.dense_inputs)
