"""Images: a folder, a torchvision data set by name, or the embedded digits; augmented by timm."""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, Subset

from spvit.checkpoint import Preprocessing
from spvit.errors import DataError

DIGITS = "digits"
DIGITS_HELD_OUT = 360

Items = Any
"""A sequence of (path, array or PIL image, class)."""

logger = logging.getLogger("spvit")


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How images are read, augmented and batched."""

    batch_size: int = 64
    """Images a step on each device."""
    workers: int = 0
    """Processes that read images beside the training process."""
    root: str = "data"
    """Folder of torchvision data sets: read from, or downloaded to."""
    download: bool = True
    """Whether a torchvision data set that is not under root may be downloaded."""
    held_out: int = 0
    """Training images to validate on in place of the validation images (0: use the validation images)."""
    skip_corrupt: bool = False
    """Leave out images that cannot be read, with a warning each, in place of stopping."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel (0 to 1); the model's own when absent."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel (0 to 1); the model's own when absent."""
    crop: float | None = None
    """Share of the resized image's side that evaluation crops from its centre; the model's own when absent."""
    crop_scale: tuple[float, float] = (0.35, 1.0)
    """Share of the image's area that a random training crop takes: least and most."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    """Width by height of a random training crop: least and most."""
    flip: float = 0.5
    """Probability of mirroring a training image left to right."""
    color_jitter: float = 0.0
    """Strength of random changes of brightness, contrast and saturation (DeiT: 0.4)."""
    auto_augment: str | None = None
    """timm's automatic augmentation by name (DeiT: rand-m9-mstd0.5-inc1)."""
    random_erasing: float = 0.0
    """Probability of erasing a rectangle of a training image (DeiT: 0.25)."""
    mixup: float = 0.0
    """Alpha of mixup, 0 for none (DeiT: 0.8)."""
    cutmix: float = 0.0
    """Alpha of cutmix, 0 for none (DeiT: 1.0)."""
    repeated_augmentation: int = 0
    """Times that an image stands in a step, augmented differently, over all devices; an epoch keeps its number of
    steps, with so many times fewer images (DeiT: 3). 0 for none."""


@dataclass(frozen=True)
class Images:
    """Training and validation images with their classes.

    Items are (transformed image, class index), or None for an image that cannot be read and is left out.
    """

    train: Dataset[Any]
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

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | None:
        source, target = self.items[index]
        try:
            image = _open(source).convert("L" if self.channels == 1 else "RGB")
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            message = f"image {source} cannot be read ({reason}); remove it, or pass --images.skip_corrupt true"
            if not self.skip_corrupt:
                raise DataError(message) from error
            logger.warning("left out: image %s cannot be read (%s)", source, reason)
            return None
        return self.transform(image), int(target)


def _open(source: Any) -> Image.Image:
    if isinstance(source, (str, Path)):
        with Image.open(source) as image:
            image.load()
            return image
    return Image.fromarray(source) if isinstance(source, np.ndarray) else source


def load_images(source: str, config: ImageConfig, size: tuple[int, int, int], preprocessing: Preprocessing) -> Images:
    """Return the images that `find_images` finds, as `images_of` prepares them. Raises DataError as both do."""
    return images_of(*find_images(source, config), config, size, preprocessing)


def find_images(source: str, config: ImageConfig) -> tuple[Items, Items, tuple[str, ...]]:
    """Return training and validation items, (path, array or PIL image, class) each, and the names of the classes.

    Args:
        source: a folder with `train/` and `val/`, each with a folder a class; the name of a torchvision data set; or
            `digits`.
        config: where torchvision's data sets are.

    Raises:
        DataError: nothing is found, or a class is missing or empty.
    """
    if source == DIGITS:
        return _digits()
    return _folder(Path(source)) if Path(source).is_dir() else _torchvision(source, config)


def images_of(
    train: Items,
    validation: Items,
    classes: tuple[str, ...],
    config: ImageConfig,
    size: tuple[int, int, int],
    preprocessing: Preprocessing,
) -> Images:
    """Return images prepared for a model, augmented and normalised.

    Args:
        train: as `find_images` returns them; so are `validation` and `classes`.
        config: how to read and augment.
        size: (channels, height, width) that the model takes.
        preprocessing: normalisation and resizing of the model; what `config` says takes precedence.

    Raises:
        DataError: an option is out of range.
    """
    preprocessing = Preprocessing(
        config.mean or preprocessing.mean,
        config.std or preprocessing.std,
        preprocessing.interpolation,
        config.crop or preprocessing.crop,
    )
    _check(config, preprocessing, size[0])
    training, evaluation = transforms(config, size, preprocessing)
    channels, skip = size[0], config.skip_corrupt
    train_images: Dataset[Any] = TransformedImages(train, training, channels, skip)
    if config.held_out == 0:
        validation_images = TransformedImages(validation, evaluation, channels, skip)
        return Images(train_images, validation_images, classes, preprocessing, config)
    if config.held_out >= len(train):
        raise DataError(f"images.held_out is {config.held_out}, but there are only {len(train)} training images")
    # A fixed permutation: the same images are held out in every run, whatever its seed.
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = Subset(TransformedImages(train, evaluation, channels, skip), order[: config.held_out])
    return Images(Subset(train_images, order[config.held_out :]), held_out, classes, preprocessing, config)


def _check(config: ImageConfig, preprocessing: Preprocessing, channels: int) -> None:
    for name, least in (("batch_size", 1), ("workers", 0), ("held_out", 0), ("repeated_augmentation", 0)):
        value = getattr(config, name)
        if value < least:
            raise DataError(f"images.{name} is {value}, expected {least} or more")
    if config.crop is not None and not 0 < config.crop <= 1:
        raise DataError(f"images.crop is {config.crop}, expected a share of the side: above 0, at most 1")
    if (config.mixup > 0 or config.cutmix > 0) and config.batch_size % 2:
        raise DataError(f"images.batch_size is {config.batch_size}; mixup and cutmix need an even one")

    for name in ("mean", "std"):
        values = getattr(preprocessing, name)
        if len(values) != channels:
            raise DataError(
                f"images.{name} has {len(values)} values, but the model takes {channels} channels; give one a channel"
            )


def transforms(
    config: ImageConfig, size: tuple[int, int, int], preprocessing: Preprocessing
) -> tuple[Callable[[Image.Image], Tensor], Callable[[Image.Image], Tensor]]:
    """Return timm's training and evaluation transforms of PIL images to tensors [channels, height, width]."""
    from timm.data import create_transform

    shared = {name: getattr(preprocessing, name) for name in ("interpolation", "mean", "std")}
    try:
        training = create_transform(
            size,
            is_training=True,
            scale=config.crop_scale,
            ratio=config.crop_ratio,
            hflip=config.flip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            re_prob=config.random_erasing,
            re_mode="pixel",
            **shared,
        )
    except (AssertionError, ValueError) as error:
        if config.auto_augment is None:
            raise
        raise DataError(
            f"images.auto_augment {config.auto_augment!r} is not one of timm's; give one such as rand-m9-mstd0.5-inc1, "
            "augmix-m5-w4-d2 or original"
        ) from error
    return _keep_a_bit(training), create_transform(size, crop_pct=preprocessing.crop, **shared)


def _keep_a_bit(training: Any) -> Any:
    """Let posterizing keep one bit at least: where timm keeps none, Pillow 13 raises ValueError."""
    for part in training.transforms:
        groups = [getattr(part, "ops", []), *getattr(part, "policy", [])]
        for operation in (operation for group in groups for operation in group):
            if getattr(operation, "name", "").startswith("Posterize"):
                operation.aug_fn = _posterize
    return training


def _posterize(image: Image.Image, bits: int, **others: Any) -> Any:
    from timm.data.auto_augment import posterize

    return posterize(image, max(1, bits), **others)


def mixup_of(config: ImageConfig, classes: int, smoothing: float) -> Callable[[Tensor, Tensor], Any] | None:
    """Return timm's mixup/cutmix of a batch, which makes soft targets, or None when neither is asked for."""
    if config.mixup <= 0 and config.cutmix <= 0:
        return None
    from timm.data import Mixup

    mixup: Callable[[Tensor, Tensor], Any] = Mixup(
        mixup_alpha=config.mixup, cutmix_alpha=config.cutmix, label_smoothing=smoothing, num_classes=classes
    )
    return mixup


def _digits() -> tuple[Items, Items, tuple[str, ...]]:
    """Return scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: 1,437 to train on, 360 to validate on."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("the digits are scikit-learn's; install them with: pip install 'spvit[demo]'") from error
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).astype(np.uint8)
    train, validation = train_test_split(
        np.arange(len(pixels)), test_size=DIGITS_HELD_OUT, random_state=0, stratify=digits.target
    )
    items = [(pixels[index], int(digits.target[index])) for index in range(len(pixels))]
    classes = tuple(str(name) for name in digits.target_names)
    return [items[i] for i in train], [items[i] for i in validation], classes


def _folder(folder: Path) -> tuple[Items, Items, tuple[str, ...]]:
    from torchvision.datasets import ImageFolder

    splits = {}
    for split in ("train", "val"):
        if not (folder / split).is_dir():
            raise DataError(f"{folder} has no folder {split}/; expected train/ and val/, each with a folder a class")
        try:
            splits[split] = ImageFolder(folder / split)
        except FileNotFoundError as error:
            reason = str(error).rstrip(".")
            raise DataError(f"{folder / split}: {reason}; expected a folder of images for each class") from error
    for here, there in (("train", "val"), ("val", "train")):
        missing = next((name for name in splits[here].classes if name not in splits[there].classes), None)
        if missing is not None:
            raise DataError(f"class {missing!r} is in {folder / here} but not in {folder / there}; they must match")
    return splits["train"].samples, splits["val"].samples, tuple(splits["train"].classes)


def _torchvision(name: str, config: ImageConfig) -> tuple[Items, Items, tuple[str, ...]]:
    import torchvision.datasets

    cls = getattr(torchvision.datasets, name, None)
    parameters = inspect.signature(cls.__init__).parameters if inspect.isclass(cls) else {}
    if "root" not in parameters or not ({"train", "split"} & set(parameters)):
        raise DataError(
            f"data {name!r} is not a folder that exists, not the name of a torchvision data set with a training and a "
            f"test part (such as CIFAR10 or FashionMNIST), and not {DIGITS!r}"
        )
    parts = [{"train": True}, {"train": False}] if "train" in parameters else _splits(parameters)
    download = {"download": config.download} if "download" in parameters else {}
    try:
        assert cls is not None
        train, validation = (cls(root=config.root, **part, **download) for part in parts)
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"torchvision's {name} is not under {config.root!r} and could not be downloaded ({reason}); put its files "
            "there, or name their folder with --images.root"
        ) from error
    classes = getattr(train, "classes", None)
    if classes is None:
        classes = range(max(int(target) for _, target in train) + 1)
    return train, validation, tuple(str(item) for item in classes)


def _splits(parameters: Any) -> list[dict[str, str]]:
    train = parameters["split"].default
    return [{"split": train if train in ("train", "trainval") else "train"}, {"split": "test"}]
