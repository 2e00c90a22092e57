"""Images of any source, augmented by timm, in batches.

Shapes: images [B, channels, height, width], normalised; targets [B], class indices.
"""

import logging
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import posterize
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, Subset, default_collate

from spvit.checkpoint import Description, Preprocessing
from spvit.errors import DataError
from spvit.hosts.host import input_size
from spvit.train.image_files import read_image
from spvit.train.settings import ImageConfig
from spvit.train.signals import ignored_by_workers
from spvit.train.sources import Files, Found, Items, find_images

UNREAD = -1  # class of a validation image that is left out
Draw = tuple[int, int]  # the index of an image, and the seed of its augmentation

logger = logging.getLogger("spvit")


@dataclass(frozen=True)
class Images:
    """Training and validation images: (transformed image, class index), or None for one that cannot be read.

    Views are the training images cropped and mirrored at random, with nothing else done to them.
    """

    train: Dataset[Any]
    views: Dataset[Any]
    validation: Dataset[Any]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    config: ImageConfig


@dataclass(frozen=True)
class TransformedImages(Dataset[Any]):
    """Applies a transform to (path or array, class) pairs; reports what cannot be read with its path."""

    items: Items
    transform: Callable[[Image.Image], Tensor]
    channels: int
    skip_corrupt: bool
    background: float

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | None:
        try:
            source, target = self.items[index]
            image = read_image(source, self.channels, self.background)
        except DataError as error:
            if not self.skip_corrupt:
                raise DataError(f"{error}; remove it, or pass --images.skip_corrupt true") from error
            logger.warning("left out: %s", error)
            return None
        return self.transform(image), int(target)


def transform(model: Description | nn.Module, preprocessing: Preprocessing | None = None) -> Callable[[Any], Tensor]:
    """Return a function that reads an image and prepares it for a model, as validation images are.

    It takes a path, a PIL image or an array [height, width] or [height, width, 3], and returns a tensor [channels,
    height, width]. It raises DataError for what cannot be read.

    Args:
        model: what `spvit.describe(folder)` returns, or any model that spvit takes or makes.
        preprocessing: how to normalise, resize and crop; None: as the description says, or ImageNet's.
    """
    size = model.input_size if isinstance(model, Description) else input_size(model)
    own = preprocessing or getattr(model, "preprocessing", None) or Preprocessing()
    prepare = transforms(ImageConfig(), size, own)[1]
    return lambda source: prepare(read_image(source, size[0]))


def load_images(source: str, config: ImageConfig, size: tuple[int, int, int], preprocessing: Preprocessing) -> Images:
    """Return the images that `find_images` finds, as `images_of` prepares them."""
    return images_of(find_images(source, config), config, size, preprocessing)


def images_of(found: Found, config: ImageConfig, size: tuple[int, int, int], preprocessing: Preprocessing) -> Images:
    """Return images for a model of (channels, height, width), normalised as it asks or as the settings say instead."""
    given = {name: getattr(config, name) or getattr(preprocessing, name) for name in ("mean", "std", "crop")}
    for name in ("mean", "std"):
        if len(given[name]) != size[0]:
            takes = f"but the model takes {size[0]} channels; give one a channel"
            raise DataError(f"images.{name} has {len(given[name])} values, {takes}")
    preprocessing = replace(preprocessing, **given)
    training, evaluation = transforms(config, size, preprocessing)
    geometric = replace(config, color_jitter=0.0, auto_augment=None, random_erasing=0.0)
    train_items, validation_items, classes = found
    train, validation = (
        TransformedImages(items, transform, size[0], config.skip_corrupt, config.background)
        for items, transform in ((train_items, training), (validation_items, evaluation))
    )
    views = replace(train, transform=transforms(geometric, size, preprocessing)[0])
    if config.held_out == 0:
        return Images(train, views, validation, classes, preprocessing, config)
    if config.held_out >= len(train):
        raise DataError(f"images.held_out is {config.held_out}, but there are only {len(train)} training images")
    # A fixed permutation: the same images are held out in every run, whatever its seed.
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = Subset(replace(validation, items=train_items), order[: config.held_out])
    left = order[config.held_out :]
    return Images(Subset(train, left), Subset(views, left), held_out, classes, preprocessing, config)


def transforms(config: ImageConfig, size: tuple[int, int, int], preprocessing: Preprocessing) -> tuple[Any, Any]:
    """Return timm's training and evaluation transforms of PIL images to tensors [channels, height, width]."""
    shared = {name: getattr(preprocessing, name) for name in ("interpolation", "mean", "std")}
    try:
        crops = {"scale": config.crop_scale, "ratio": config.crop_ratio, "hflip": config.flip}
        colors = {"color_jitter": config.color_jitter, "auto_augment": config.auto_augment}
        erasing = {"re_prob": config.random_erasing, "re_mode": "pixel"}
        training = create_transform(size, is_training=True, **crops, **colors, **erasing, **shared)
    except (AssertionError, ValueError) as error:
        if config.auto_augment is None:
            raise
        raise DataError(
            f"images.auto_augment {config.auto_augment!r} is not one of timm's; give one such as rand-m9-mstd0.5-inc1, "
            "augmix-m5-w4-d2 or original"
        ) from error
    for part in training.transforms:
        groups = [getattr(part, "ops", []), *getattr(part, "policy", [])]
        for operation in (operation for group in groups for operation in group):
            if getattr(operation, "name", "").startswith("Posterize"):
                operation.aug_fn = _posterize
    return training, create_transform(size, crop_pct=preprocessing.crop, **shared)


def _posterize(image: Image.Image, bits: int, **others: Any) -> Any:
    """Posterize to one bit at least: where timm keeps none, Pillow 13 raises ValueError."""
    return posterize(image, max(1, bits), **others)


def file_at(images: Any, index: int) -> Any:
    """Return the path, or `Stored`, of an image of a data set; None of one that is not in a file."""
    while not isinstance(images, Files):
        if isinstance(images, Subset):
            images, index = images.dataset, images.indices[index]
        elif hasattr(images, "items"):
            images = images.items
        else:
            return None
    return images[index][0]


def mixup_of(config: ImageConfig, classes: int, smoothing: float) -> Any:
    """Return timm's mixup/cutmix of a batch, which makes soft targets, or None when neither is asked for."""
    alphas = {"mixup_alpha": config.mixup, "cutmix_alpha": config.cutmix}
    return Mixup(**alphas, label_smoothing=smoothing, num_classes=classes) if max(alphas.values()) > 0 else None


def training_loader(images: Images, order: Sequence[int] | None = None) -> DataLoader[Any]:
    """Return the loader of the training images in whole batches: in an order, by index, or shuffled, each once."""
    train: Any = images.train
    _check_enough(len(train if order is None else order), images.config)
    drawn: dict[str, Any] = {"shuffle": True} if order is None else {"sampler": order}
    return DataLoader(train, drop_last=True, collate_fn=_stacked, **drawn, **_loading(images.config))


def calibration(images: Images, seed: int, count: int) -> Iterator[Tensor]:
    """Yield `count` views of training images, drawn by the seed, as batches [B, channels, height, width].

    Where there are fewer images, they have several views each, all of one in the same half of the batches: the repair
    judges by one half what it fits to the other.
    """
    set_seed(seed)
    order = torch.randperm(len(images.views)).tolist()  # type: ignore[arg-type]
    if count > len(order):
        half = (count + 1) // 2
        order = [*islice(cycle(order[::2]), half), *islice(cycle(order[1::2] or order), count - half)]
    whole = -(-count // images.config.batch_size) * images.config.batch_size
    for batch, _ in training_loader(replace(images, train=images.views), list(islice(cycle(order), whole))):
        yield batch[:count]
        count -= len(batch)


def epoch_loader(images: Images, processes: int, process: int) -> DataLoader[Any]:
    """Return the loader of a process's training images, whose sampler is a `Draws`.

    Its batches hold the indices of what could not be read, too.
    """
    train: Any = DrawnImages(images.train)
    _check_enough(len(train), images.config, processes, images.config.accumulate)
    draws: Any = Draws(images, processes, process)
    return DataLoader(train, sampler=draws, drop_last=True, collate_fn=_with_unread, **_loading(images.config))


def _check_enough(count: int, config: ImageConfig, processes: int = 1, accumulate: int = 1) -> None:
    """Raise DataError when training images do not fill one step."""
    size, each = config.batch_size, "" if processes == 1 else f" times {processes} processes"
    each += "" if accumulate == 1 else f" times images.accumulate {accumulate}"
    if count < size * processes * accumulate:
        raise DataError(f"there are {count} training images, fewer than images.batch_size {size}{each}; lower it")


class Draws(Sampler[Draw]):
    """A process's images of an epoch's whole steps in their order, each with the seed of its augmentation.

    All of it follows from the seed of the epoch, so a run can go on from any place. The repeats of repeated
    augmentation go to different processes in a step.
    """

    def __init__(self, images: Images, processes: int = 1, process: int = 0) -> None:
        repeats, order = images.config.repeated_augmentation, (images.train, processes, process)
        repeated = repeats > 1
        self.sampler: Any = (
            RepeatAugSampler(*order, num_repeats=repeats, selected_round=0)
            if repeated
            else DistributedSampler(*order, drop_last=True)
        )
        self.process = process
        step = images.config.batch_size * images.config.accumulate
        self.count = len(self.sampler) // step * step
        self.begin(0)

    def begin(self, seed: int, start: int = 0) -> None:
        """Let the next pass be of the epoch of a seed, from a place in it."""
        self.seed, self.start = seed, start

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Draw]:
        self.sampler.set_epoch(self.seed)
        for place, index in islice(enumerate(self.sampler), self.start, self.count):
            yield index, seed_of(self.seed, self.process, place)


@dataclass(frozen=True)
class DrawnImages(Dataset[Any]):
    """Images by index and seed: what augmentation draws follows from the seed alone, in whatever process.

    Of one that cannot be read its index.
    """

    images: Dataset[Any]

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int] | int:
        index, seed = draw
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        image: tuple[Tensor, int] | None = self.images[index]
        return index if image is None else image


def seed_of(*parts: object) -> int:
    """Return a seed for whatever has these parts, such as an epoch or an image of it; of 32 bits, as numpy takes."""
    return zlib.crc32(repr(parts).encode())


def validation_loader(images: Images) -> DataLoader[Any]:
    """Return the loader of the validation images, all of them in their order; targets that were not read are UNREAD."""
    return DataLoader(images.validation, collate_fn=partial(_stacked, keeping_places=True), **_loading(images.config))


def first_images(images: Images, device: torch.device, count: int = 32) -> Tensor:
    """Return the first validation images on a device, the same in every process: [count or fewer, ...]."""
    some: Any = images.validation
    few = replace(images, validation=Subset(some, range(min(count, len(some)))))
    return torch.cat([batch for batch, _ in validation_loader(few)]).to(device)


def _loading(config: ImageConfig) -> dict[str, Any]:
    pinned = torch.cuda.is_available()
    own = {"batch_size": config.batch_size, "num_workers": config.workers, "pin_memory": pinned}
    return {**own, "worker_init_fn": ignored_by_workers}


def _stacked(items: Sequence[tuple[Tensor, int] | None], keeping_places: bool = False) -> list[Tensor]:
    """Return images and targets of what could be read; zeros of class UNREAD keep the places of what could not."""
    read = [item for item in items if item is not None]
    if not read:
        raise DataError(f"none of the {len(items)} images of a batch could be read; check the image files")
    nothing = torch.zeros_like(read[0][0]), UNREAD
    stacked: list[Tensor] = default_collate([item or nothing for item in items] if keeping_places else read)
    return stacked


def _with_unread(items: Sequence[tuple[Tensor, int] | int]) -> list[Tensor]:
    """Return images and targets of what could be read, and the indices of what could not."""
    unread = torch.tensor([item for item in items if isinstance(item, int)], dtype=torch.int64)
    return [*_stacked([None if isinstance(item, int) else item for item in items]), unread]
