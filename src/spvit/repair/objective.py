"""What the outputs of a network are, and how far those of a pruned one are from the dense one's.

An *answer* is the output of a model's forward and the tokens behind its last norm. An objective takes parts of it:

    logits    class logits                       the divergence of their probabilities, in nats
    pooled    the model's output                 the squared error relative to the variance about the mean image
    tokens    prefix tokens; patch tokens        the same of each, so that all patches weigh like the prefix tokens
    features  the model's output, and tokens     the same of all three

Shapes: B batch, N tokens = P prefix tokens + G grid tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spvit.errors import CalibrationError
from spvit.hosts.calling import batch_first
from spvit.hosts.host import Host, outputs_of
from spvit.hosts.walk import first_inputs, through, tokens_of
from spvit.repair.interpolation import FLOOR

OBJECTIVES = ("auto", "logits", "features", "pooled", "tokens")
AGREEMENT = 1e-3
"""Largest difference, relative to the largest magnitude, of outputs that are computed in two ways."""

Asked = str | Callable[[Any], Tensor]
"""An objective as a user names it: one of OBJECTIVES, or a function of the model's output."""


@dataclass(frozen=True)
class Answer:
    """What a model answers to images."""

    output: Any
    """Whatever its forward returned."""
    tokens: Tensor
    """[B, N, D], or a map [B, height, width, D]: behind the last norm, or the last block where there is none."""


def answer_of(host: Host, images: Tensor) -> Answer:
    """Return what a host answers to images.

    Tokens are the output of the last module that keeps the shape of the last block's output. What runs inside a module
    that was reached after that block, such as the keys of a pooling layer, does not count.
    """
    model, last = host.model, host.blocks[-1]
    block, tokens, inside = model.get_submodule(last.path), [], []  # type: ignore[var-annotated]
    end = block[-1] if isinstance(block, nn.ModuleList) else block  # such a list is not called, its layers add

    def enter(module: nn.Module, args: Any) -> None:
        if tokens:
            inside.append(module)

    def batches(x: Tensor) -> Tensor:
        return batch_first(last.attention, x) if x.dim() == 3 and len(x) != len(images) else x

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if inside and inside[-1] is module:
            inside.pop()
        if module is end:
            tokens[:] = [batches(tokens_of(output) + (0 if end is block else args[0]))]
        elif tokens and not inside and isinstance(output, Tensor) and batches(output).shape == tokens[0].shape:
            tokens[:] = [batches(output)]

    handles = [module.register_forward_pre_hook(enter) for module in model.modules()]
    handles += [module.register_forward_hook(leave) for module in model.modules()]
    try:
        output = model(images)
    finally:
        for handle in handles:
            handle.remove()
    if not tokens:
        raise CalibrationError(f"the model's last block {last.path} was not reached; its forward pass leaves it out")
    return Answer(output, tokens[0])


@dataclass(frozen=True)
class Objective:
    """What counts of an answer."""

    name: str
    prefix_tokens: int
    function: Callable[[Any], Tensor] | None = None

    @staticmethod
    def of(asked: Asked, host: Host) -> Objective:
        """Return the objective that a user asks for; `auto` is by how many classes the host tells apart."""
        name = name_of(asked)
        if name == "auto":
            name = ("features", "pooled", "logits")[min(host.family.classes(host.model), 2)]
        return Objective(name, host.blocks[-1].attention.prefix_tokens, None if isinstance(asked, str) else asked)

    def parts(self, answer: Answer) -> list[Tensor]:
        """Return the parts of an answer that count, [B, ...] each."""
        if self.function is not None:
            part = self.function(answer.output)
            if not isinstance(part, Tensor) or part.shape[:1] != answer.tokens.shape[:1]:
                found = f"a tensor {list(part.shape)}" if isinstance(part, Tensor) else f"a {type(part).__name__}"
                raise CalibrationError(f"the objective, {self.name}, returned {found}, expected a tensor [images, ...]")
            return [part]
        tokens = [answer.tokens]
        if self.prefix_tokens:
            tokens = [part for part in answer.tokens.tensor_split([self.prefix_tokens], dim=1) if part.numel()]
        if self.name == "tokens":
            return tokens
        outputs = outputs_of(answer.output)
        if self.name == "features":
            return [part for part in outputs if part.shape != answer.tokens.shape] + tokens
        if self.name == "logits" and (outputs[0].dim() not in (2, 4) or outputs[0].shape[1] < 2):
            raise CalibrationError(
                f"the model's output is {list(outputs[0].shape)}, which are not the logits of 2 or more classes "
                "[images, classes]; score it by objective='features'"
            )
        return outputs

    def distance(self, found: Tensor, dense: Tensor) -> float:
        """Return how far a part [B, ...] is from the dense one, summed over images."""
        found, dense = found.double(), dense.double()
        if self.name != "logits":
            return float((found - dense).square().sum())
        pair = (F.log_softmax(found, dim=1), F.log_softmax(dense, dim=1))
        return float(F.kl_div(*pair, reduction="sum", log_target=True))

    def scale(self, dense: list[Tensor]) -> float:
        """Return what to divide distances by that are summed over batches of a part: the images, or the variance."""
        count = sum(len(part) for part in dense)
        if self.name == "logits":
            return float(count)
        mean = torch.stack([part.double().sum(0) for part in dense]).sum(0) / count
        return sum(float((part.double() - mean).square().sum()) for part in dense)


def name_of(asked: Asked) -> str:
    """Return the name of an objective as scores keep it. Raises CalibrationError for an unknown one."""
    if callable(asked):
        return f"function {getattr(asked, '__qualname__', type(asked).__qualname__)}"
    if asked not in OBJECTIVES:
        expected = ", ".join(OBJECTIVES)
        raise CalibrationError(f"objective is {asked!r}, expected {expected}, or a function of the model's output")
    return asked


class Reference:
    """The dense network's answers to all batches of images, and how far others are from them."""

    def __init__(self, objective: Objective, answers: Iterable[Answer]) -> None:
        self._objective = objective
        self._dense = [objective.parts(answer) for answer in answers]
        self._scales = [max(objective.scale(list(batches)), FLOOR) for batches in zip(*self._dense)]

    def distance(self, answers: Iterable[Answer]) -> float:
        """Return how far answers to the same batches are from the dense ones, the mean of their parts."""
        total = 0.0
        for answer, dense in zip(answers, self._dense):
            for part, own, scale in zip(self._objective.parts(answer), dense, self._scales):
                total += self._objective.distance(part, own) / scale
        return total / len(self._scales)


class _Passing(nn.Module):
    """Stands where a block was, or a layer that adds to the tokens: passes them on, or what it has been given."""

    def __init__(self, block: nn.Module, adds: bool) -> None:
        super().__init__()
        self._block = (block,)  # not a part of this module
        self._adds = adds
        self.training = block.training
        self.given: Tensor | None = None
        self.rest: tuple[Any, ...] | None = None
        """What the block returns besides, if it returns a tuple."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first tensor is x: [B, N, D]."""
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        out = x if self.given is None else self.given
        if self._adds:
            out = out - x
        return out if self.rest is None else (out, *self.rest)


class Head:
    """What a host does behind its last block, as a function of that block's output."""

    def __init__(self, host: Host, images: Tensor) -> None:
        passing: dict[int, _Passing] = {}
        for site in host.blocks:
            block = host.model.get_submodule(site.path)
            adds = isinstance(block, nn.ModuleList)
            for layer in block if isinstance(block, nn.ModuleList) else [block]:
                passing[id(layer)] = self._last = _Passing(layer, adds)
        self._shell = host.on(copy.deepcopy(host.model, dict(passing)))
        self._image = images[:1]

        def record(module: nn.Module, args: Any, output: Any) -> None:
            passing[id(module)].rest = tuple(output[1:]) if isinstance(output, tuple) else None

        handles = [own._block[0].register_forward_hook(record) for own in passing.values()]
        try:
            host.model(self._image)
        finally:
            for handle in handles:
                handle.remove()

    def __call__(self, out: Tensor) -> Answer:
        """Return the host's answer from the last block's output, [B, N, D], or [N, B, D] where tokens are first."""
        self._last.given = out
        count = len(batch_first(self._shell.blocks[-1].attention, out))
        return answer_of(self._shell, self._image.expand(count, -1, -1, -1))

    def agrees(self, host: Host, objective: Objective, images: Tensor) -> bool:
        """Return whether that is all that the host's outputs come from; other blocks' outputs may reach them, too."""
        wanted = objective.parts(answer_of(host, images))
        [x] = first_inputs(host, [images])
        for index in range(len(host.blocks)):
            x = through(host, index, x)
        try:
            found = objective.parts(self(x))
        except Exception:  # whatever it needs is not there; a fault of the objective itself has shown above
            return False
        return all(bool((a - b).abs().max() <= AGREEMENT * b.abs().max()) for a, b in zip(found, wanted))
