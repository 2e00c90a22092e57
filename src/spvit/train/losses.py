"""The loss terms of a step beside the budget's, task and distillation; and the teacher that distillation asks.

A teacher is any model, called with the student's batch. Only plain class logits are compared: the published SPViT
distils plain DeiT, and a host with a distillation token gives the mean of its two heads unless its
`distilled_training` is on. Shapes: images [B, channels, height, width]; logits [B, classes].
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spvit.checkpoint import Preprocessing
from spvit.errors import DataError, ModelError, UnsupportedHostError
from spvit.hosts.host import logits_of
from spvit.models import ModelConfig, input_of, number_of_classes, open_model
from spvit.train.settings import PhaseConfig


def task_loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Return the cross entropy of logits with class indices [B] or soft targets [B, classes]."""
    return F.cross_entropy(logits, targets, label_smoothing=smoothing if targets.dim() == 1 else 0.0)


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return the KL divergence of student from teacher at a temperature, times its square."""
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def hard_distillation_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the cross entropy of the student with the teacher's first guess, as DeiT distils."""
    return F.cross_entropy(logits, teacher_logits.argmax(dim=1))


def agreement_loss(logits: Tensor, teacher_logits: Tensor, settings: PhaseConfig) -> Tensor:
    """Return the loss of distillation of the kind that a phase's settings name."""
    if settings.distillation_kind == "hard":
        return hard_distillation_loss(logits, teacher_logits)
    return distillation_loss(logits, teacher_logits, settings.distillation_temperature)


class Teacher(nn.Module):
    """A frozen model behind the change from the student's normalisation and image size to its own (None: any size).

    What augmentation, mixup and cutmix made of the batch stays: the teacher judges the pixels that the student sees.
    """

    def __init__(
        self, model: nn.Module, own: Preprocessing, student: Preprocessing, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.size = size
        values = (student.mean, student.std, own.mean, own.std)
        mean, std, own_mean, own_std = (torch.tensor(value).view(-1, 1, 1) for value in values)
        self.same = values[:2] == values[2:]
        self.scale, self.shift = nn.Buffer(std / own_std), nn.Buffer((mean - own_mean) / own_std)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits for a batch of the student: bicubic to the teacher's size, in its normalisation."""
        if self.size is not None and images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return logits_of(self.model(images if self.same else images * self.scale + self.shift))


def open_teacher(name: str, classes: Sequence[str], student: Preprocessing, weights: bool = True) -> Teacher:
    """Return the teacher of a name, in evaluation mode; without `weights` it serves to measure with.

    Raises ModelError or CheckpointError when it cannot be read, DataError when its classes or channels are others.
    """
    try:
        opened = open_model(ModelConfig(model=name), any_family=True, weights=weights)
        own_classes = number_of_classes(opened.model)
    except (ModelError, UnsupportedHostError) as error:
        raise ModelError(f"teacher: {error}") from error
    if own_classes != len(classes):
        advice = "name one of these classes, such as a folder that spvit train wrote"
        raise DataError(f"teacher {name} has {own_classes} classes, but the images have {len(classes)}; {advice}")
    (channels, size), own = input_of(opened.model), len(student.mean)
    if channels != own:
        advice = "name a teacher that takes the same"
        raise DataError(f"teacher {name} takes {channels} channels, but the model {own}; {advice}")
    return Teacher(opened.model, opened.preprocessing, student, size).eval()
