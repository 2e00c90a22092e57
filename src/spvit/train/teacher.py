"""The teacher of a distillation: any model, fed with the student's batch as it takes its images itself.

A teacher is called as any model is. Only plain class logits are compared: the published SPViT distils plain DeiT, and a
host with a distillation token gives the mean of its two heads unless its `distilled_training` is on.

Shapes: images [B, channels, height, width]; logits [B, classes].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spvit.checkpoint import Preprocessing
from spvit.errors import DataError, ModelError, UnsupportedHostError
from spvit.hosts.host import logits_of
from spvit.models import ModelConfig, input_of, number_of_classes, open_model
from spvit.train.data import Images
from spvit.train.settings import PhaseConfig


class Teacher(nn.Module):
    """A frozen model behind the change from the student's normalisation and image size to its own.

    What augmentation, mixup and cutmix made of the batch stays: the teacher judges the pixels that the student sees.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, model: nn.Module, own: Preprocessing, student: Preprocessing, size: tuple[int, int] | None = None
    ) -> None:
        """Wrap a model with its `own` preprocessing, for images of the student's; `size` is None if it takes any."""
        super().__init__()
        self.model = model.requires_grad_(False)
        self.size = size
        values = (student.mean, student.std, own.mean, own.std)
        mean, std, own_mean, own_std = (torch.tensor(value).view(-1, 1, 1) for value in values)
        self.same = values[:2] == values[2:]
        self.register_buffer("scale", std / own_std)
        self.register_buffer("shift", (mean - own_mean) / own_std)

    def prepared(self, images: Tensor) -> Tensor:
        """Return the student's images as the teacher takes them: bicubic to its size, in its normalisation."""
        if self.size is not None and images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return images if self.same else images * self.scale + self.shift

    def forward(self, images: Tensor) -> Tensor:
        """Return the teacher's logits for a batch of the student."""
        return logits_of(self.model(self.prepared(images)))


def open_teacher(name: str, images: Images, weights: bool = True) -> Teacher:
    """Return the teacher of a name, in evaluation mode.

    It is a timm model of any kind, hf:NAME or a folder that spvit wrote. Without `weights` it serves to measure with.

    Raises:
        ModelError, CheckpointError: it cannot be found or read.
        DataError: its classes or channels are not those of the images.
    """
    try:
        opened = open_model(ModelConfig(model=name), any_family=True, weights=weights)
        classes = number_of_classes(opened.model)
    except (ModelError, UnsupportedHostError) as error:
        raise ModelError(f"teacher: {error}") from error
    if classes != len(images.classes):
        raise DataError(
            f"teacher {name} has {classes} classes, but the images have {len(images.classes)}; name one of these "
            "classes, such as a folder that spvit train wrote"
        )
    channels, size = input_of(opened.model)
    if channels != len(images.preprocessing.mean):
        raise DataError(
            f"teacher {name} takes {channels} channels, but the model {len(images.preprocessing.mean)}; name a teacher "
            "that takes the same"
        )
    return Teacher(opened.model, opened.preprocessing, images.preprocessing, size).eval()


def open_teachers(phases: Sequence[PhaseConfig], images: Images, weights: bool = True) -> dict[str, nn.Module]:
    """Return the teachers that phases name, each opened once."""
    names = dict.fromkeys(phase.teacher for phase in phases if phase.epochs > 0 and phase.teacher is not None)
    return {name: open_teacher(name, images, weights) for name in names}
