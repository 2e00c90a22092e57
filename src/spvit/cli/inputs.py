"""What a command starts from: the model and the images, each fitted to the other."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from spvit.cli.options import EvaluateCommand, RunCommand
from spvit.errors import DataError, ModelError
from spvit.hosts.recognise import family_of
from spvit.models import HUGGING_FACE, OpenedModel, number_of_classes, open_model
from spvit.train.data import ImageConfig, Images, find_images, images_of

logger = logging.getLogger("spvit")


def model_and_images(
    options: RunCommand | EvaluateCommand,
    trains_head: bool = False,
    weights: bool = True,
    find: Callable[[str, ImageConfig], Any] = find_images,
) -> tuple[OpenedModel, Images]:
    """Return a model whose head has as many classes as the images, and images of the size that it takes.

    Args:
        options: which model, and which images.
        trains_head: whether the run begins by training the model, whose head may then be new.
        weights: whether to load pre-trained weights; without them the model is one to count and measure.
        find: finds the images, called as `find_images`.

    Raises:
        DataError: the images cannot be found, or the model has other classes that cannot be changed.
        ModelError, CheckpointError, UnsupportedHostError: the model cannot be opened, or is not trained.
    """
    train, validation, classes = find(options.data, options.images)
    opened = open_model(options, len(classes), weights=weights)
    count = number_of_classes(opened.model)
    if count != len(classes):
        found = f"{options.data} has {len(classes)} classes, but {options.model} was made for {count}"
        raise DataError(f"{found}; use a model of these classes")
    _compare_classes(opened.classes, classes, options.model, options.data)
    if not opened.trained and not trains_head:
        raise ModelError(
            f"{options.model} has no trained weights for these {count} classes; train it first (spvit train, or "
            "--dense.epochs), or name trained weights with --checkpoint"
        )
    size = family_of(opened.model).input_size(opened.model)
    return opened, images_of(train, validation, classes, options.images, size, opened.preprocessing)


def _compare_classes(own: tuple[str, ...] | None, found: tuple[str, ...], model: str, data: str) -> None:
    """Raise DataError when images have a model's classes in another order; warn when they have other names."""
    if own is None or own == found:
        return
    place = next(index for index, names in enumerate(zip(own, found)) if names[0] != names[1])
    difference = f"class {place} of {model} is {own[place]!r}, of {data} {found[place]!r}"
    if sorted(own) == sorted(found):
        raise DataError(
            f"{difference}: the classes are in another order; name the folders so that they sort as the model's do"
        )
    if not model.startswith(HUGGING_FACE):  # where the same classes often have other names
        logger.warning("%s: if these are not the same, the model's outputs are not for these classes", difference)
