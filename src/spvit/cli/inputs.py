"""What a command that trains starts from: the model and the images, each fitted to the other."""

from __future__ import annotations

import logging
from collections.abc import Callable

from spvit.errors import DataError, ModelError
from spvit.hosts.recognise import family_of
from spvit.models import HUGGING_FACE, ModelConfig, OpenedModel, number_of_classes, open_model
from spvit.train.data import ImageConfig, Images, load_images

logger = logging.getLogger("spvit")


def model_and_images(
    model: ModelConfig,
    data: str,
    config: ImageConfig,
    *,
    weights: bool = True,
    load: Callable[..., Images] = load_images,
) -> tuple[OpenedModel, Images]:
    """Return a model whose head has as many classes as the images, and images of the size that it takes.

    Args:
        model: which model.
        data: which images.
        config: how they are read.
        weights: whether to load pre-trained weights; without them the model is one to count and measure.
        load: what finds the images, called as `load_images`.

    Raises:
        DataError: the images cannot be had, or the model has other classes that cannot be changed.
        ModelError, CheckpointError, UnsupportedHostError: the model cannot be had.
    """
    # The images' class count decides the head, and the model's input decides the images: the head is fitted second.
    first = open_model(model, weights=weights)
    size = family_of(first.model).input_size(first.model)
    images = load(data, config, size, first.preprocessing)
    classes = number_of_classes(first.model)
    if classes == len(images.classes):
        _compare_classes(first.classes, images.classes, model.model, data)
        return first, images
    opened = open_model(model, len(images.classes), weights=weights)
    if number_of_classes(opened.model) != len(images.classes):
        raise DataError(
            f"{data} has {len(images.classes)} classes, but {model.model} was made for {classes}; use a model of these "
            "classes"
        )
    return opened, images


def _compare_classes(own: tuple[str, ...] | None, found: tuple[str, ...], model: str, data: str) -> None:
    """Raise DataError when images have a model's classes in another order; say so when they have other names."""
    if own is None or own == found:
        return
    place = next(index for index, names in enumerate(zip(own, found)) if names[0] != names[1])
    told = f"class {place} of {model} is {own[place]!r}, of {data} {found[place]!r}"
    if sorted(own) == sorted(found):
        raise DataError(f"{told}: the classes are in another order; name the folders so that they sort as the model's")
    if model.startswith(HUGGING_FACE):
        return  # where the same classes often have other names
    logger.warning("%s: if these are not the same, the model's outputs do not stand for these classes", told)


def check_trained(opened: OpenedModel, model: str, images: Images, trains_head: bool) -> None:
    """Raise ModelError when a model has no trained weights for the images and the run does not begin with training."""
    if not opened.trained and not trains_head:
        raise ModelError(
            f"{model} has no trained weights for these {len(images.classes)} classes; train it first "
            "(spvit train, or --dense.epochs), or name trained weights with --checkpoint"
        )
