"""How good a model is: its accuracy on labelled images, or how far it agrees with the dense model on any.

Shapes: images [B, channels, height, width]; targets [B]; parts of an answer, see `spvit.repair.objective`, [B, ..., D].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from spvit.hosts.host import Host, logits_of
from spvit.repair.objective import Asked, Objective, answer_of
from spvit.train.data import UNREAD, Images, validation_loader
from spvit.train.losses import agreement_loss
from spvit.train.processes import make_accelerator
from spvit.train.settings import LoopConfig, PhaseConfig


@dataclass(frozen=True)
class Evaluation:
    """Shares of images, 0 to 1, whose class is the first guess, and among five; mean cross entropy; and how many."""

    accuracy: float
    accuracy_top5: float
    loss: float
    images: int

    @property
    def quality(self) -> float:
        """What models are compared by."""
        return self.accuracy

    @property
    def words(self) -> str:
        """The quality in words."""
        return f"accuracy {self.accuracy:.2%}"


@dataclass(frozen=True)
class Agreement:
    """How alike a model's answers are to the dense model's, 1 for the same, and on how many images."""

    agreement: float
    """Share of the images with the same first guess; of features the mean cosine, of both less the dense mean."""
    images: int

    @property
    def quality(self) -> float:
        """What models are compared by."""
        return self.agreement

    @property
    def words(self) -> str:
        """The quality in words."""
        return f"agreement {self.agreement:.4f}"


Figures = Evaluation | Agreement


def figures_from(values: dict[str, Any]) -> Figures:
    """Return the figures that a file of a run holds."""
    return Agreement(**values) if "agreement" in values else Evaluation(**values)


@dataclass(frozen=True)
class Reference:
    """The dense model that others are to agree with, and what counts of its answers."""

    host: Host
    objective: Objective
    means: tuple[Tensor, ...] = ()
    """Of every part of features, over images and tokens: [D]."""
    variances: tuple[float, ...] = ()
    """Of every part, the mean squared deviation."""

    @torch.no_grad()
    def parts(self, images: Tensor) -> list[Tensor]:
        """Return the parts of the dense model's answer."""
        return self.objective.parts(answer_of(self.host, images))

    def agreement(self, parts: list[Tensor], wanted: list[Tensor]) -> Tensor:
        """Return the agreement on each image, [B]."""
        if not self.means:
            return (parts[0].argmax(1) == wanted[0].argmax(1)).float()
        cosines = [
            F.cosine_similarity(own.float() - mean, part.float() - mean, dim=-1).flatten(1).mean(1)
            if own.dim() > 2
            else F.cosine_similarity(own.float() - mean, part.float() - mean)
            for own, part, mean in zip(parts, wanted, self.means)
        ]
        return torch.stack(cosines).mean(0)

    def loss(self, parts: list[Tensor], wanted: list[Tensor], settings: PhaseConfig) -> Tensor:
        """Return how far answers are from the dense ones: the loss of distillation, or of features the squared error.

        The squared error is relative to the variance, and the mean over parts.
        """
        if not self.means:
            return agreement_loss(parts[0].float(), wanted[0].float(), settings)
        errors = [F.mse_loss(own.float(), part.float()) for own, part in zip(parts, wanted)]
        return torch.stack([error / scale for error, scale in zip(errors, self.variances)]).mean()


class Answering(nn.Module):
    """A model that returns the parts of its answer that count, as a module for Accelerate to prepare."""

    def __init__(self, model: nn.Module, reference: Reference) -> None:
        super().__init__()
        self.model = model
        self.host, self.objective = reference.host.on(model), reference.objective

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the parts that the objective takes."""
        return self.objective.parts(answer_of(self.host, images))


def reference_of(dense: nn.Module | Host, images: Images, config: LoopConfig, asked: Asked = "auto") -> Reference:
    """Return a dense model as the reference for others, with the means of its features on the validation images."""
    host = Host.of(dense)
    found = Reference(host.on(host.model.eval()), Objective.of(asked, host))
    if found.objective.name == "logits":
        return found
    accelerator = make_accelerator()
    sums: list[Any] = []
    for batch, targets in accelerator.prepare(validation_loader(images)):
        with autocast(accelerator.device, config.precision):
            parts = [part.double().reshape(len(part), -1, part.shape[-1]) for part in found.parts(batch)]
        read = (targets != UNREAD).double()[:, None]
        squares = [part.square().mean((1, 2))[:, None] for part in parts]
        rows = [torch.cat([part.mean(1), square, read], dim=1) * read for part, square in zip(parts, squares)]
        gathered = [accelerator.gather_for_metrics(row).sum(0) for row in rows]
        sums = [own + new for own, new in zip(sums, gathered)] if sums else gathered
    accelerator.free_memory()
    means = tuple(total[:-2] / total[-1].clamp(min=1) for total in sums)
    variances = tuple(
        max(1e-12, float(total[-2] / total[-1] - mean.square().mean())) for total, mean in zip(sums, means)
    )
    return replace(found, means=tuple(mean.float() for mean in means), variances=variances)


def figures_of(model: nn.Module, images: Images, config: LoopConfig, reference: Reference | None = None) -> Figures:
    """Return a model's figures on the validation images; with a reference, its agreement with that."""
    accelerator = make_accelerator()
    answering = model if reference is None else Answering(model, reference)
    prepared, loader = accelerator.prepare(answering, validation_loader(images))
    figures = evaluate(prepared, loader, accelerator, config.precision, reference)
    accelerator.free_memory()
    return figures


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    accelerator: Accelerator,
    precision: str,
    reference: Reference | None = None,
) -> Figures:
    """Return a model's figures over a loader, across all processes. The model's training flag survives.

    With a reference, the model is an `Answering` one.
    """
    was_training = model.training
    model.eval()
    columns = 4 if reference is None else 2
    sums = torch.zeros(columns, dtype=torch.float64)
    for images, targets in loader:
        with autocast(accelerator.device, precision):
            outputs = model(images)
            wanted = [] if reference is None else reference.parts(images)
        read = (targets != UNREAD).float()
        if reference is None:
            logits = logits_of(outputs).float()
            losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=UNREAD)
            ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
            figures = torch.stack([ranked[:, 0].float(), ranked.any(1).float(), losses, read], dim=1)
        else:
            figures = torch.stack([reference.agreement(outputs, wanted) * read, read], dim=1)
        sums += accelerator.gather_for_metrics(figures).cpu().double().sum(0)
    model.train(was_training)
    count = int(sums[-1])
    means = (sums[:-1] / max(count, 1)).tolist()
    return Agreement(means[0], count) if reference is not None else Evaluation(means[0], means[1], means[2], count)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context of a forward pass: `fp32` as it is, `bf16` in mixed precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
