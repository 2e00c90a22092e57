"""Passes images through a network block by block: what arrives at a module, its output, and the next block's input.

Shapes: B batch, N tokens = P prefix tokens + G grid tokens, D width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from spvit.errors import CalibrationError
from spvit.hosts.calling import answering, batch_first, in_mode, inside, reached, tokens_of
from spvit.hosts.host import Host, check_values
from spvit.hosts.sites import BlockSites

Report = Callable[[str, int, int, Mapping[str, float]], object]
"""What long work calls as it goes: with its phase, the steps done, the steps in all, and figures by name."""
BATCH = 64
FULL = 3072
"""Tokens of the first block that a batch of small images is filled up to; more at once take memory anew each time."""
Found = TypeVar("Found")

Part = tuple[dict[str, Any], dict[str, Tensor]]
"""What long work finished of a block: values for JSON, and tensors on the CPU."""


class Finished(Protocol):
    """What long work finished, by block, for a call with the same arguments to go on from: a dictionary, or files."""

    def get(self, block: int, /) -> Part | None:
        """Return what was finished of a block, if it was."""

    def __setitem__(self, block: int, part: Part, /) -> None: ...


def calibration_batches(host: Host, images: Tensor | Iterable[Any]) -> Iterator[Tensor]:
    """Yield calibration images as batches [B, channels, height, width] on the host's device, in its dtype.

    Args:
        host: the model that takes them.
        images: a tensor of images, or batches of them. Of a batch that is a tuple or list, as loaders give, the first
            item counts; of a dictionary `pixel_values`.

    Raises:
        CalibrationError: there are none, they are not of the size that the host takes, raw bytes, or not finite.
    """
    parameter = next(host.model.parameters())
    check_values(parameter)
    if not isinstance(images, Iterable):
        raise CalibrationError(f"calibration images are {type(images).__name__}, expected a tensor, or batches of them")
    site, held, empty = host.blocks[0].attention, [], True
    for batch in images.split(BATCH) if isinstance(images, Tensor) else images:
        tensor = _images_of(batch, host.input_size)
        held += [tensor.to(parameter)] if len(tensor) else []
        # Calls of layers would take longer than their arithmetic on a few small images.
        if sum(map(len, held)) * (math.prod(site.grid) + site.prefix_tokens) >= FULL:
            yield held[0] if len(held) == 1 else torch.cat(held)
            held, empty = [], False
    if held:
        yield torch.cat(held)
    elif empty:
        raise CalibrationError("there are no calibration images; give a few hundred or more")


def _images_of(batch: Any, size: tuple[int, int, int]) -> Tensor:
    """Return the images of a batch. Raises CalibrationError saying what is wrong with them."""
    if isinstance(batch, Mapping):
        if "pixel_values" not in batch:
            raise CalibrationError(f"a calibration batch has {', '.join(batch)}, expected pixel_values among them")
        batch = batch["pixel_values"]
    tensor = batch[0] if isinstance(batch, (tuple, list)) else batch
    found = f"{list(tensor.shape[1:])}" if isinstance(tensor, Tensor) else type(tensor).__name__
    if not isinstance(tensor, Tensor) or tuple(tensor.shape[1:]) != size:
        expected = f"tensors of [batch, {', '.join(map(str, size))}] as the model takes them"
    elif not tensor.is_floating_point():
        found = str(tensor.dtype).removeprefix("torch.")
        expected = "floating-point numbers normalised as in training: (images / 255 - mean) / std"
    elif not tensor.isfinite().all():
        raise CalibrationError("calibration images hold values that are not finite; check how they are read")
    else:
        return tensor
    raise CalibrationError(f"calibration images are {found}, expected {expected}")


@contextmanager
def where_float64_is(*models: nn.Module) -> Iterator[None]:
    """Move models to the CPU inside the context if their device lacks float64 (MPS)."""
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
    """Put models in evaluation mode without gradients in the context, where float64 is.

    Flags are restored after, and buffers that all models have: some hosts update theirs in any forward pass.
    """
    shared = set.intersection(*({name for name, _ in model.named_buffers()} for model in models))
    kept = [
        (module._buffers, name, buffer, buffer.clone())
        for model in models
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and f"{path}.{name}".lstrip(".") in shared
    ]
    try:
        with torch.no_grad(), in_mode(False, *models), where_float64_is(*models):
            yield
    finally:
        for buffers, name, buffer, values in kept:
            buffers[name] = buffer
            if not torch.equal(buffer, values):
                buffer.copy_(values)


def block_of(host: Host, index: int) -> Callable[[Tensor], Tensor]:
    """Return a block as a function of the tokens that it takes, which returns the tokens that it answers.

    What the model passes to it besides is passed here too. A ModuleList is the sum that it stands for.
    """
    path = host.blocks[index].path
    block, call = host.model.get_submodule(path), host.calls[path]
    if isinstance(block, nn.ModuleList):
        return lambda x: functools.reduce(lambda stream, layer: layer(stream) + stream, block, x)
    return lambda x: tokens_of(call(block, x.clone()))  # some blocks add to their input in place


def entry_of(host: Host, index: int) -> nn.Module:
    """Return the module that is called with what a block takes: the block, or the first of its layers."""
    block = host.model.get_submodule(host.blocks[index].path)
    return block[0] if isinstance(block, nn.ModuleList) else block


def first_inputs(host: Host, batches: Iterable[Tensor]) -> list[Tensor]:
    """Return what the first block takes, a batch of images each."""
    entry = entry_of(host, 0)
    return [reached(host.model, batch, entry, output=False) for batch in batches]


def through(host: Host, index: int, x: Tensor) -> Tensor:
    """Return what the next block takes from a block's input; after the last block, its output."""
    out = block_of(host, index)(x)
    following = host.blocks[index + 1] if index + 1 < len(host.blocks) else None
    if following is None or following.before is None:
        return out
    module, call = host.model.get_submodule(following.before), host.calls[following.before]
    if following.channels_first:
        maps = out.unflatten(1, host.blocks[index].attention.grid) if out.dim() == 3 else out
        answer = tokens_of(call(module, maps.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        return answer.flatten(1, 5 - out.dim())
    return tokens_of(call(module, out))


def advance(host: Host, index: int, inputs: list[Tensor], attention: list[Any] | None = None) -> None:
    """Replace a block's inputs by those of the next block, in place, batch by batch.

    attention: what the block's attention answers for each batch; where there is nothing the layer runs.
    """
    layer = inside(host.model.get_submodule(host.blocks[index].attention.path))
    for number, x in enumerate(inputs):
        with keeping(layer, attention, number) if attention else nullcontext():
            inputs[number] = through(host, index, x)


def keeping(module: nn.Module, answers: list[Any], number: int) -> AbstractContextManager[None]:
    """Have a module answer what is kept for a batch inside the context; the first time it runs, and that is kept."""
    run = module.forward

    def answer(*args: Any, **kwargs: Any) -> Any:
        if number == len(answers):
            answers.append(run(*args, **kwargs))
        # Some blocks add to it in place.
        return tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, answers[number])

    return answering(module, answer)


@dataclass(frozen=True)
class BlockPair:
    """One block of the pruned model beside the dense one, with the inputs that each has: lists of [B, N, D].

    Those of a host with its tokens first are [N, B, D].
    """

    model: nn.Module
    host: Host
    index: int
    inputs: list[Tensor]
    dense_inputs: list[Tensor]
    known: dict[str, list[Any]] | None = None
    """What was found of the dense block, a batch each, for several fits that ask for it; None: it is found anew."""
    prefix: int = 0
    """Prefix tokens that weigh more in fits than all others together, where nothing reads those; 0: all alike."""

    excess: list[float] = field(default_factory=list)
    """What fits leave behind: by which share their errors on held-out images are larger than on those fitted to."""
    attention: list[Any] | None = None
    """If a list, what they leave behind of the pruned block's attention: what it answers once fitted, a batch each."""

    @property
    def sites(self) -> BlockSites:
        """Where the block's layers are."""
        return self.host.blocks[self.index]

    def knowing(self, path: str) -> BlockPair:
        """Return the same pair that has run a module of the dense block once, for several fits to its output."""
        return replace(self, known={path: list(self.wanted(path))})

    @property
    def counts(self) -> list[int]:
        """Images in each batch."""
        return [x.shape[1 if self.sites.attention.token_first else 0] for x in self.inputs]

    def images(self, x: Tensor, some: slice) -> Tensor:
        """Return the tokens of some images, of what a block takes."""
        return x[:, some] if self.sites.attention.token_first else x[some]

    def thinned(self, tokens: int) -> BlockPair:
        """Return a pair of dense blocks with at most as many of its images, evenly from all, as have so many tokens."""
        some = slice(None, None, -(-sum(x.shape[:-1].numel() for x in self.dense_inputs) // tokens))
        inputs = [self.images(x, some) for x in self.dense_inputs]
        # What is known may be in windows, several an image.
        known = {
            path: [out.unflatten(0, (count, -1))[some].flatten(0, 1) for out, count in zip(outputs, self.counts)]
            for path, outputs in (self.known or {}).items()
        }
        return replace(self, inputs=inputs, dense_inputs=inputs, known=known)

    @property
    def block(self) -> Callable[[Tensor], Tensor]:
        """The pruned block, as a function of tokens."""
        return block_of(self.host.on(self.model), self.index)

    @property
    def dense_block(self) -> Callable[[Tensor], Tensor]:
        """The dense block, as a function of tokens."""
        return block_of(self.host, self.index)

    def arriving(self, path: str) -> Iterator[Tensor]:
        """Yield what arrives at a module of the pruned block, [B, N, ...]; of attention, at its projections."""
        site, block, module, output = self.sites.attention, self.block, self.model.get_submodule(path), False
        if path == site.path and inside(module) is not module:  # which gets its tokens batch first
            return (reached(block, x, inside(module), output) for x in self.inputs)
        if path == site.path and site.inner_norm is not None:
            module, output = module.get_submodule(site.inner_norm), True
        return (batch_first(site, reached(block, x, module, output)) for x in self.inputs)

    def wanted(self, path: str) -> Iterator[Tensor]:
        """Yield the output of a module of the dense block, [B, N, ...]."""
        block, module = self.dense_block, self.host.model.get_submodule(path)
        return self.of_dense(path, lambda x: batch_first(self.sites.attention, reached(block, x, module, output=True)))

    def of_dense(self, name: str, find: Callable[[Tensor], Found]) -> Iterator[Found]:
        """Yield what is found for each batch of the dense inputs; by name, what is known already."""
        if self.known is None:
            return map(find, self.dense_inputs)
        if name not in self.known:
            self.known[name] = [find(x) for x in self.dense_inputs]
        return iter(self.known[name])
