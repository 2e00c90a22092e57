"""The teacher of a distillation: any model, fed with the student's batch as it takes its images itself.

A teacher is called as any model is. Only plain class logits are compared: the published SPViT distils plain DeiT, and a
host with a distillation token gives the mean of its two heads unless its `distilled_training` is on.

Shapes: images [B, channels, height, width]; logits [B, classes].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spvit.checkpoint import Preprocessing
from spvit.errors import DataError, ModelError, UnsupportedHostError
from spvit.hosts.host import logits_of
from spvit.hosts.recognise import family_of
from spvit.models import ModelConfig, number_of_classes, open_model
from spvit.train.data import Images
from spvit.train.settings import PhaseConfig, check_settings


class Teacher(nn.Module):
    """A frozen model behind the change from the student's normalisation and image size to its own.

    What augmentation, mixup and cutmix made of the batch stays: the teacher judges the pixels that the student sees.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, model: nn.Module, own: Preprocessing, student: Preprocessing, size: tuple[int, int] | None = None
    ) -> None:
        """Wrap a model.

        Args:
            model: takes images normalised as `own` says.
            own: preprocessing of the teacher.
            student: preprocessing of the images that will come.
            size: (height, width) that the model needs; None when it takes any.
        """
        super().__init__()
        self.model = model.requires_grad_(False)
        self.size = size
        mean, std, own_mean, own_std = (
            torch.tensor(values).view(-1, 1, 1) for values in (student.mean, student.std, own.mean, own.std)
        )
        self.same = (own.mean, own.std) == (student.mean, student.std)
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

    Args:
        name: a timm model of any kind, hf:NAME, or a folder that spvit wrote.
        images: what it will teach on, as the student takes them.
        weights: whether to load its weights; without them it serves to measure with.

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
    channels, size = _input(opened.model)
    if channels != len(images.preprocessing.mean):
        raise DataError(
            f"teacher {name} takes {channels} channels, but the model {len(images.preprocessing.mean)}; name a teacher "
            "that takes the same"
        )
    return Teacher(opened.model, opened.preprocessing, images.preprocessing, size).eval()


def check_phases(phases: Sequence[PhaseConfig], images: Images, weights: bool = True) -> None:
    """Refuse settings out of range and bad teachers of all phases, before the first one trains anything.

    Args:
        phases: settings of the phases to come.
        images: what they train on.
        weights: whether the teachers' weights are looked at too.
    """
    for phase in phases:
        check_settings(phase)
    for name in dict.fromkeys(phase.teacher for phase in phases if phase.epochs > 0):
        if name is not None:
            open_teacher(name, images, weights)


def check_dense_phase(phase: PhaseConfig) -> None:
    """Raise DataError when the training of the dense model itself is to distil from nobody."""
    if phase.distillation > 0 and phase.teacher is None:
        raise DataError(
            f"dense.distillation is {phase.distillation}, but before the dense model is trained it cannot teach; name "
            "a teacher with --dense.teacher, or leave distillation out"
        )


def _input(model: Any) -> tuple[int, tuple[int, int] | None]:
    """Return a model's channels, and the (height, width) that it needs, None for any."""
    try:
        channels, height, width = family_of(model).input_size(model)
        return channels, (height, width)
    except UnsupportedHostError:
        source = getattr(model, "pretrained_cfg", None)
        if source is None:  # of Hugging Face: images are resized to what it was trained on
            side = getattr(model.config, "image_size", None)
            return getattr(model.config, "num_channels", 3), None if side is None else _pair(side)
        channels, height, width = source["input_size"]
        return channels, (height, width) if source.get("fixed_input_size") else None


def _pair(side: Any) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else (side[0], side[1])
