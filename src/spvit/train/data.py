"""Images: a folder, labelled or not, a torchvision data set, or the embedded digits; augmented by timm, in batches.

Shapes: images [B, channels, height, width], normalised; targets [B], class indices.
"""

import inspect
import logging
import math
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.datasets
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import posterize
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, Subset, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS

from spvit.checkpoint import Description, Preprocessing
from spvit.errors import DataError
from spvit.hosts.host import input_size
from spvit.train.pictures import read_picture
from spvit.train.settings import ImageConfig
from spvit.train.signals import ignored_by_workers

DIGITS = "digits"
DIGITS_HELD_OUT = 360
UNREAD = -1  # class of a validation image that is left out
VALIDATED, MOST_VALIDATED = 0.1, 5000
"""Share and number of the images of a folder without labels that validate."""
Items = Any  # a sequence of (path, array or PIL image, class)
Draw = tuple[int, int]  # the index of an image, and the seed of its augmentation
Found = tuple[Items, Items, tuple[str, ...]]  # training and validation items, and the names of the classes

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
        source, target = self.items[index]
        try:
            image = read_picture(source, self.channels, self.background)
        except DataError as error:
            if not self.skip_corrupt:
                raise DataError(f"{error}; remove it, or pass --images.skip_corrupt true") from error
            logger.warning("left out: %s", error)
            return None
        return self.transform(image), int(target)


def _first_line(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    return reason.splitlines()[0] if reason else type(error).__name__


def transform(model: Description | nn.Module, preprocessing: Preprocessing | None = None) -> Callable[[Any], Tensor]:
    """Return a function that reads an image and prepares it for a model, as validation images are.

    It takes a path, a PIL image or an array [height, width] or [height, width, 3], and returns a tensor [channels,
    height, width]. It raises DataError for what cannot be read.

    Args:
        model: what `spvit.describe(folder)` returns, or any model that spvit takes or makes.
        preprocessing: how to normalise, resize and crop; None: as the description says, or ImageNet's.
    """
    size = model.input_size if isinstance(model, Description) else input_size(model)
    assert size is not None  # descriptions that were read say it
    own = preprocessing or getattr(model, "preprocessing", None) or Preprocessing()
    prepare = transforms(ImageConfig(), size, own)[1]
    return lambda source: prepare(read_picture(source, size[0]))


def find_images(source: str, config: ImageConfig) -> Found:
    """Return the images of a folder, a torchvision data set by name, or `digits`; of images without labels no classes.

    A folder has `train/` and `val/`, with a folder a class in each; or images without labels, in these or anywhere in
    it: then a tenth of them validates.
    """
    if source == DIGITS:
        return _digits()
    return _folder(Path(source)) if Path(source).is_dir() else _torchvision(source, config)


def _digits() -> Found:
    """Return scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: 1,437 to train on, 360 to validate on."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("the digits are scikit-learn's; install them with: pip install 'spvit[demo]'") from error
    digits = load_digits()
    items = list(zip((digits.images * (255 / 16)).astype(np.uint8), digits.target.tolist()))
    train, validation = train_test_split(items, test_size=DIGITS_HELD_OUT, random_state=0, stratify=digits.target)
    return train, validation, tuple(str(name) for name in digits.target_names)


class _Folder(torchvision.datasets.ImageFolder):
    """A folder a class; hidden ones, which other programs leave behind, are none."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the classes, and their indices by name. Raises FileNotFoundError when there are none."""
        classes = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        if not classes:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}")
        return classes, {name: index for index, name in enumerate(classes)}


def _is_picture(path: str) -> bool:
    name = Path(path).name
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def _folder(folder: Path) -> Found:
    """Return the images of `train/` and `val/`, with a folder a class in each; without such folders, without labels."""
    parts = [folder / split for split in ("train", "val")]
    absent = [part.name for part in parts if not part.is_dir()]
    if len(absent) == 1:
        raise DataError(f"{folder} has no folder {absent[0]}/; expected train/ and val/, or neither without labels")
    if absent:
        images = _images_under(folder)
        if len(images) < 2:
            problem = f"{folder} has no folders train/ and val/, and {len(images)} images"
            raise DataError(f"{problem}; expected both, with a folder a class in each, or images without labels")
        return (*_split(images, min(MOST_VALIDATED, math.ceil(VALIDATED * len(images)))), ())
    if not any(entry.is_dir() for part in parts for entry in part.iterdir()):
        train, validation = (_images_under(part) for part in parts)
        if not (train and validation):
            found = f"{len(train)} images in train/ and {len(validation)} in val/"
            raise DataError(f"{folder} has {found}, expected some in both, or a folder of them for each class")
        return train, validation, ()
    splits = {}
    for part in parts:
        try:
            splits[part.name] = _Folder(part, is_valid_file=_is_picture)
        except FileNotFoundError as error:
            raise DataError(
                f"{part}: {str(error).rstrip('. ')}; expected a folder of images (.jpg, .png, ...) for each class, or "
                "images alone"
            ) from error
    for here, there in (("train", "val"), ("val", "train")):
        missing = next((name for name in splits[here].classes if name not in splits[there].classes), None)
        if missing is not None:
            raise DataError(f"class {missing!r} is in {folder / here} but not in {folder / there}; they must match")
    return splits["train"].samples, splits["val"].samples, tuple(splits["train"].classes)


def _images_under(folder: Path) -> list[tuple[Path, int]]:
    """Return the image files of a folder and its folders, in order of their names, without a class."""
    paths = [path for path in sorted(folder.rglob("*")) if _is_picture(str(path)) and path.is_file()]
    return [(path, 0) for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _split(items: list[Any], held_out: int) -> tuple[list[Any], list[Any]]:
    """Return the items to train on and those held out, by a fixed permutation: the same in every run."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()
    return [items[index] for index in order[held_out:]], [items[index] for index in order[:held_out]]


def _torchvision(name: str, config: ImageConfig) -> Found:
    made = getattr(torchvision.datasets, name, None)
    parameters = inspect.signature(made.__init__).parameters if inspect.isclass(made) else {}
    if made is None or "root" not in parameters or not ({"train", "split"} & set(parameters)):
        raise DataError(
            f"data {name!r} is not a folder that exists, not the name of a torchvision data set with a training and a "
            f"test part (such as CIFAR10 or FashionMNIST), and not {DIGITS!r}"
        )
    parts: Any = ({"train": True}, {"train": False})
    if "train" not in parameters:
        parts = ({"split": "trainval" if parameters["split"].default == "trainval" else "train"}, {"split": "test"})
    download = {"download": config.download} if "download" in parameters else {}
    try:
        train, validation = (made(root=config.root, **part, **download) for part in parts)
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(
            f"torchvision's {name} is not under {config.root!r} and could not be downloaded ({_first_line(error)}); "
            "put its files there, or name their folder with --images.root"
        ) from error
    classes = getattr(train, "classes", None) or range(max(int(target) for _, target in train) + 1)
    return train, validation, tuple(str(item) for item in classes)


def load_images(source: str, config: ImageConfig, size: tuple[int, int, int], preprocessing: Preprocessing) -> Images:
    """Return the images that `find_images` finds, as `images_of` prepares them."""
    return images_of(find_images(source, config), config, size, preprocessing)


def images_of(found: Found, config: ImageConfig, size: tuple[int, int, int], preprocessing: Preprocessing) -> Images:
    """Return images for a model of (channels, height, width), normalised as it asks or as the settings say instead."""
    given = {name: getattr(config, name) for name in ("mean", "std", "crop")}
    preprocessing = replace(preprocessing, **{name: value for name, value in given.items() if value})
    for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
        if len(values) != size[0]:
            takes = f"but the model takes {size[0]} channels; give one a channel"
            raise DataError(f"images.{name} has {len(values)} values, {takes}")
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


def mixup_of(config: ImageConfig, classes: int, smoothing: float) -> Any:
    """Return timm's mixup/cutmix of a batch, which makes soft targets, or None when neither is asked for."""
    alphas = {"mixup_alpha": config.mixup, "cutmix_alpha": config.cutmix}
    return Mixup(**alphas, label_smoothing=smoothing, num_classes=classes) if max(alphas.values()) > 0 else None


def training_loader(images: Images, sampler: Iterable[Any] | None = None, processes: int = 1) -> DataLoader[Any]:
    """Return the loader of the training images in whole batches: as a sampler draws them, or shuffled, each once."""
    count: int = len(sampler if isinstance(sampler, list) else images.train)  # type: ignore[arg-type]
    size, each = images.config.batch_size, "" if processes == 1 else f" times {processes} processes"
    times = images.config.accumulate if isinstance(sampler, Draws) else 1
    each += "" if times == 1 else f" times images.accumulate {times}"
    if count < size * processes * times:
        raise DataError(f"there are {count} training images, fewer than images.batch_size {size}{each}; lower it")
    order: dict[str, Any] = {"shuffle": True} if sampler is None else {"sampler": sampler}
    return DataLoader(images.train, drop_last=True, collate_fn=_stacked, **order, **_loading(images.config))


def epoch_loader(images: Images, processes: int, process: int) -> DataLoader[Any]:
    """Return the loader of a process's training images, whose sampler is a `Draws`."""
    draws = Draws(images, processes, process)
    return training_loader(replace(images, train=DrawnImages(images.train)), draws, processes)


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
    """Images by index and seed: what augmentation draws follows from the seed alone, in whatever process."""

    images: Dataset[Any]

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int] | None:
        index, seed = draw
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        return self.images[index]


def seed_of(*parts: object) -> int:
    """Return a seed for whatever has these parts, such as an epoch or an image of it; of 32 bits, as numpy takes."""
    return zlib.crc32(repr(parts).encode())


def validation_loader(images: Images) -> DataLoader[Any]:
    """Return the loader of the validation images, all of them in their order; targets that were not read are UNREAD."""
    return DataLoader(images.validation, collate_fn=partial(_stacked, keeping_places=True), **_loading(images.config))


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
