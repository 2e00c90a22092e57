"""Images in batches: every epoch of training in another order, and all of the validation images.

Shapes: images [B, channels, height, width], normalised; targets [B], class indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from spvit.errors import DataError
from spvit.train.data import ImageConfig, Images

UNREAD = -1
"""Class of a validation image that is left out."""


def _collate(items: Sequence[tuple[Tensor, int] | None]) -> tuple[Tensor, Tensor]:
    """Stack what could be read: images [B, channels, height, width] and targets [B]."""
    read = [item for item in items if item is not None]
    if not read:
        raise DataError(f"none of the {len(items)} images of a batch could be read; check the image files")
    return torch.stack([image for image, _ in read]), torch.tensor([target for _, target in read])


def _collate_all(items: Sequence[tuple[Tensor, int] | None]) -> tuple[Tensor, Tensor]:
    """Stack as `_collate`, with zeros of class UNREAD for what could not be read: processes must count alike."""
    known = next((item[0] for item in items if item is not None), None)
    stand_in = None if known is None else (torch.zeros_like(known), UNREAD)
    return _collate([stand_in if item is None else item for item in items])


def training_loader(images: Images) -> DataLoader[Any]:
    """Return the loader of the training images: shuffled, each once, in whole batches. Raises DataError if too few."""
    _check_enough(images)
    return DataLoader(images.train, shuffle=True, drop_last=True, **_loading(images.config))


def repeated_loader(images: Images, processes: int, process: int) -> DataLoader[Any]:
    """Return the loader of one process's share of the training images with repeated augmentation: whole batches.

    The repeats of an image go to different processes as far as there are any, in the same step. Each epoch its order
    comes from the sampler's `set_epoch`. Raises DataError when there are too few images for a batch of every process.
    """
    from timm.data.distributed_sampler import RepeatAugSampler

    _check_enough(images, processes)
    repeats = images.config.repeated_augmentation
    sampler = RepeatAugSampler(
        images.train, num_replicas=processes, rank=process, num_repeats=repeats, selected_round=0
    )
    return DataLoader(images.train, sampler=sampler, drop_last=True, **_loading(images.config))


def _check_enough(images: Images, processes: int = 1) -> None:
    needed = images.config.batch_size * processes
    count = len(images.train)  # type: ignore[arg-type]
    if count < needed:
        each = "" if processes == 1 else f" times {processes} processes"
        raise DataError(
            f"there are {count} training images, fewer than images.batch_size {images.config.batch_size}{each}"
        )


def validation_loader(images: Images) -> DataLoader[Any]:
    """Return the loader of the validation images, all of them in their order; targets that were not read are UNREAD."""
    return DataLoader(images.validation, shuffle=False, **{**_loading(images.config), "collate_fn": _collate_all})


def _loading(config: ImageConfig) -> dict[str, Any]:
    return {
        "batch_size": config.batch_size,
        "num_workers": config.workers,
        "collate_fn": _collate,
        "pin_memory": torch.cuda.is_available(),
    }
