"""What the outputs of a network are, and how far those of a pruned one are from the dense one's.

An *answer* is the output of a model's forward and the tokens behind its last norm. An objective takes parts of it:

    logits    class logits                       the divergence of their probabilities, in nats
    pooled    the model's output                 the squared error relative to the variance about the mean image
    tokens    prefix tokens; patch tokens        the same of each, so that all patches weigh like the prefix tokens
    features  the model's output, and tokens     the same of all three

Shapes: B batch, N tokens = P prefix tokens + G grid tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spvit.errors import CalibrationError
from spvit.hosts.calling import batch_first
from spvit.hosts.host import Host, outputs_of
from spvit.hosts.walk import tokens_of

OBJECTIVES = ("auto", "logits", "features", "pooled", "tokens")

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

    def direction(self, dense: Tensor, generator: torch.Generator) -> Tensor:
        """Return a random direction of a part [B, ...], whose second moment is the curvature of its distance.

        Of a squared error that is the identity; of a divergence (diag(p) - p p^T) / 2, with p the probabilities.
        """
        noise = torch.randn(dense.shape, generator=generator).to(dense)
        if self.name != "logits":
            return noise
        root = dense.softmax(dim=1).sqrt()
        return root * (noise - root * (root * noise).sum(dim=1, keepdim=True)) / math.sqrt(2)

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
