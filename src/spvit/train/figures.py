"""How good a model is: its accuracy on labelled images, or how far it agrees with the dense model on any.

Shapes: images [B, channels, height, width]; targets [B]; parts of an answer, see `spvit.repair.objective`, [B, ..., D].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from spvit.errors import RunError
from spvit.hosts.calling import in_mode
from spvit.hosts.host import Host, logits_of
from spvit.repair.objective import Asked, Objective, answer_of
from spvit.train.data import UNREAD, Images, validation_loader
from spvit.train.losses import agreement_loss
from spvit.train.processes import make_accelerator
from spvit.train.settings import LoopConfig, PhaseConfig

KEPT = 2**30
"""Bytes of the dense model's answers that are kept: others, of many images to many features, are found anew."""


def quality_of(figures: Mapping[str, Any]) -> tuple[str, float]:
    """Return what models are compared by, and how good one is: accuracy, or agreement where there are no labels."""
    name = "agreement" if figures.get("accuracy") is None else "accuracy"
    return name, figures[name]


def said(name: str, value: float) -> str:
    """Return a figure as it is written."""
    if name.startswith("accuracy"):
        return f"{value:.2%}"
    return f"{value:.4f}" if name == "agreement" else f"{value:.4g}"


class Judged:
    """A model's figures, which are compared by their accuracy or their agreement."""

    @property
    def quality(self) -> float:
        """What models are compared by."""
        return quality_of(vars(self))[1]

    @property
    def judged_by(self) -> str:
        """What the quality is: `accuracy` or `agreement`."""
        return quality_of(vars(self))[0]

    @property
    def written(self) -> str:
        """The quality as it is written."""
        return said(*quality_of(vars(self)))

    @property
    def words(self) -> str:
        """What the quality is, and how good."""
        return f"{self.judged_by} {self.written}"


@dataclass(frozen=True)
class Evaluation(Judged):
    """Shares of images, 0 to 1, whose class is the first guess, and among five; mean cross entropy; and how many."""

    accuracy: float
    accuracy_top5: float
    loss: float
    images: int


@dataclass(frozen=True)
class Agreement(Judged):
    """How alike a model's answers are to the dense model's, 1 for the same, and on how many images."""

    agreement: float
    """Share of the images with the same first guess; of features the mean cosine, of both less the dense mean."""
    images: int


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
    images: int = 0
    """Validation images that can be read."""
    known: tuple[list[Tensor], ...] = ()
    """Parts of the answers to the first batches of validation images: as many as KEPT bytes hold."""

    @torch.no_grad()
    def parts(self, images: Tensor) -> list[Tensor]:
        """Return the parts of the dense model's answer."""
        return self.objective.parts(answer_of(self.host, images))

    def validation(self, number: int, images: Tensor) -> list[Tensor]:
        """Return the parts of the dense model's answer to a batch of validation images, by its number."""
        return self.known[number] if number < len(self.known) else self.parts(images)

    def agreement(self, parts: list[Tensor], wanted: list[Tensor]) -> Tensor:
        """Return the agreement on each image, [B]."""
        if not self.means:
            return (parts[0].argmax(1) == wanted[0].argmax(1)).float()
        cosines = [
            F.cosine_similarity(own.float() - mean, part.float() - mean, dim=-1).reshape(len(own), -1).mean(1)
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
    """Return a dense model as the reference for others, with its answers to the validation images, and their means."""
    host = Host.of(dense)
    found = Reference(host.on(host.model.eval()), Objective.of(asked, host))
    accelerator, known, left = make_accelerator(), [], KEPT  # type: Accelerator, list[list[Tensor]], int
    sums: list[Any] = []
    for batch, targets in accelerator.prepare(validation_loader(images)):
        with autocast(accelerator.device, config.precision):
            answers = found.parts(batch)
        left -= sum(part.nbytes for part in answers)
        known += [answers] if left >= 0 else []
        parts = [part.double().reshape(len(part), -1, part.shape[-1]) for part in answers]
        read = (targets != UNREAD).double()[:, None]
        squares = [part.square().mean((1, 2))[:, None] for part in parts]
        rows = [torch.cat([part.mean(1), square, read], dim=1) * read for part, square in zip(parts, squares)]
        gathered = [accelerator.gather_for_metrics(row).sum(0) for row in rows]
        sums = [own + new for own, new in zip(sums, gathered)] if sums else gathered
    accelerator.free_memory()
    found = replace(found, images=int(sums[0][-1]), known=tuple(known))
    if not all(total.isfinite().all() for total in sums):
        raise not_finite(host.model)
    if found.objective.name == "logits":
        return found
    means = tuple(total[:-2] / total[-1].clamp(min=1) for total in sums)
    variances = tuple(
        max(1e-12, float(total[-2] / total[-1] - mean.square().mean())) for total, mean in zip(sums, means)
    )
    return replace(found, means=tuple(mean.float() for mean in means), variances=variances)


def figures_of(
    models: Sequence[nn.Module], images: Images, config: LoopConfig, reference: Reference | None = None
) -> list[Figures]:
    """Return models' figures on the validation images, read once; with a reference, their agreement with that.

    Raises RunError when outputs are not finite.
    """
    if reference is not None and list(models) == [reference.host.model]:
        return [Agreement(1.0, reference.images)]
    accelerator = make_accelerator()
    answering = models if reference is None else [Answering(model, reference) for model in models]
    loader, *prepared = accelerator.prepare(validation_loader(images), *answering)
    found = evaluate(prepared, loader, accelerator, config.precision, reference)
    accelerator.free_memory()
    return [finite(figures, model) for figures, model in zip(found, models)]


def is_finite(figures: Figures) -> bool:
    """Return whether figures are of outputs that are finite."""
    return math.isfinite(getattr(figures, "loss", figures.quality))


def finite(figures: Figures, model: nn.Module) -> Figures:
    """Return a model's figures. Raises RunError when they are of outputs that are not finite."""
    if is_finite(figures):
        return figures
    raise not_finite(model)


def not_finite(model: nn.Module) -> RunError:
    """Return the error about a model whose outputs are not finite."""
    found = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    more = f" and of {len(found) - 1} more tensors" if len(found) > 1 else ""
    cause = f"nor are weights of {found[0]}{more}" if found else "though its weights are: it overflows"
    return RunError(f"the model's outputs are not finite, {cause}; use weights from before")


@torch.no_grad()
def evaluate(
    models: Sequence[nn.Module],
    loader: Iterable[Any],
    accelerator: Accelerator,
    precision: str,
    reference: Reference | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> list[Figures]:
    """Return models' figures over a loader, across all processes. The models' training flags survive.

    With a reference, the models are `Answering` ones, and the loader is of the validation images. `after_batch` is
    called after each batch.
    """
    sums = torch.zeros(len(models), 4 if reference is None else 2, dtype=torch.float64)
    with in_mode(False, *models):
        for number, (images, targets) in enumerate(loader):
            with autocast(accelerator.device, precision):
                wanted = [] if reference is None else reference.validation(number, images)
                answers = [model(images) for model in models]
            read = (targets != UNREAD).float()
            for total, outputs in zip(sums, answers):
                if reference is None:
                    columns = [*_guesses(logits_of(outputs).float(), targets), read]
                else:
                    columns = [reference.agreement(outputs, wanted) * read, read]
                total += accelerator.gather_for_metrics(torch.stack(columns, dim=1)).cpu().double().sum(0)
            after_batch()
    made: Any = Evaluation if reference is None else Agreement
    return [made(*(total[:-1] / total[-1].clamp(min=1)).tolist(), int(total[-1])) for total in sums]


def _guesses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return whether the class is the first guess, and whether it is among five, and the cross entropy, [B] each."""
    losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=UNREAD)
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
    return ranked[:, 0].float(), ranked.any(1).float(), losses


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context of a forward pass: `fp32` as it is, `bf16` in mixed precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
