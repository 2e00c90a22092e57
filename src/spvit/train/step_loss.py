"""The loss of a step but for the budget's: by labels, by a teacher, or by the dense model alone.

Shapes: images [B, channels, height, width]; labels [B], or [B, classes] of mixed images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spvit.errors import DataError
from spvit.hosts.host import Host, logits_of
from spvit.train.figures import Reference, autocast
from spvit.train.hidden import HiddenStates
from spvit.train.kept_views import KeptViews
from spvit.train.losses import agreement_loss, task_loss
from spvit.train.settings import PhaseConfig

HIDDEN_SHARE = 0.99
"""Of hidden states where the dense model is all there is to learn from (docs/experiments/distillation.md)."""


class StepLoss:
    """Returns the loss of a batch, a scalar, and what to record of it; `close` leaves the models as they were.

    With a reference its dense model is what to agree with, and else the labels, and the teacher if settings distil.
    """

    def __init__(
        self,
        phase: str,
        settings: PhaseConfig,
        model: nn.Module,
        teacher: nn.Module | None,
        reference: Reference | None,
        images: Callable[[], Tensor],
        kept: KeptViews | None = None,
    ) -> None:
        """images: of which hidden states have scales; kept: the views of all batches, whose numbers stand for labels.

        Raises DataError where nobody teaches what settings ask for.
        """
        self.settings, self.reference, self.hidden, self.kept = settings, reference, None, kept
        share = settings.distillation_hidden
        self.hidden_share = share if share is not None else 0.0 if reference is None else HIDDEN_SHARE
        asked = {"distillation": settings.distillation, "distillation_hidden": self.hidden_share}
        name = next((name for name, share in asked.items() if share > 0), None)
        dense = teacher if reference is None else reference.host
        if name is not None and dense is None:
            advice = f"name a teacher with --{phase}.teacher, or leave distillation out"
            raise DataError(f"{phase}.{name} is {asked[name]}, but there is no teacher; {advice}")
        if settings.kept_views and kept is None:
            why = "only spvit compress keeps them, of images without labels"
            raise DataError(f"{phase}.kept_views is {settings.kept_views}, but {why}; leave it out")
        self.teacher = None if name is None or reference is not None else teacher
        if self.hidden_share > 0 and dense is not None and len((host := Host.of(dense)).blocks) > 1:
            self.hidden = HiddenStates(model, host, images())

    def __call__(
        self, forward: Callable[[Tensor], Any], images: Tensor, labels: Tensor, precision: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """forward: returns what the model answers, of which the reference compares parts."""
        if self.hidden is None:
            return self._of_outputs(forward, images, labels, precision)
        with self.hidden.keeping() as (_, dense):
            loss, values = self._of_outputs(forward, images, labels, precision)
            dense += [] if self.kept is None else self.kept.hidden_of(labels)
            error = self.hidden.error()
        loss = (1 - self.hidden_share) * loss + self.hidden_share * error
        return loss, {**values, "hidden_loss": error.detach()}

    def _of_outputs(
        self, forward: Callable[[Tensor], Any], images: Tensor, labels: Tensor, precision: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(images.device, precision):
            outputs = forward(images)
            wanted = None if self.reference is None else self._dense_parts(self.reference, images, labels)
        if self.reference is not None and wanted is not None:
            loss = self.reference.loss(outputs, wanted, self.settings)
            return loss, {"agreement_loss": loss.detach()}
        logits = logits_of(outputs).float()
        loss = task = task_loss(logits, labels, self.settings.label_smoothing)
        if self.teacher is not None:
            with torch.no_grad(), autocast(images.device, precision):
                guidance = logits_of(self.teacher(images)).float()
            agreement = agreement_loss(logits, guidance, self.settings)
            loss = (1 - self.settings.distillation) * loss + self.settings.distillation * agreement
        return loss, {"task_loss": task.detach()}

    def _dense_parts(self, reference: Reference, images: Tensor, labels: Tensor) -> list[Tensor]:
        return reference.parts(images) if self.kept is None else self.kept.parts_of(labels)

    def close(self) -> None:
        """Take the hooks off the models."""
        if self.hidden is not None:
            self.hidden.close()
