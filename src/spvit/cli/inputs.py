"""What a command starts from: the model and the images, each fitted to the other."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from spvit.cli.options import EvaluateCommand, RunCommand
from spvit.errors import DataError, ModelError
from spvit.hosts.host import input_size
from spvit.hosts.recognise import family_of
from spvit.models import HUGGING_FACE, OpenedModel, number_of_classes, open_model
from spvit.train.data import Images, images_of
from spvit.train.settings import ImageConfig
from spvit.train.sources import find_images


def model_and_images(
    options: RunCommand | EvaluateCommand,
    trains_head: bool = False,
    weights: bool = True,
    find: Callable[[str, ImageConfig], Any] = find_images,
    unlabelled: bool = False,
) -> tuple[OpenedModel, Images]:
    """Return a model whose head has as many classes as the images, and images of the size that it takes.

    The head of a model that the run trains first may be new. With `unlabelled` images need no labels, and a model that
    tells no classes apart takes images of any. Raises DataError when there are no images, or the model has other
    classes that cannot be changed; and what `open_model` raises.
    """
    found = find(options.data, options.images)
    classes = found[-1] if len(found[-1]) > 1 else ()
    if not classes and not unlabelled:
        expected = "expected train/ and val/, with a folder a class in each"
        problem = "a single class" if found[-1] else "no labels"
        raise DataError(f"{options.data} has {problem}, but this command needs several classes; {expected}")
    opened = open_model(options, None if unlabelled else len(classes), weights=weights, code=True)
    if unlabelled and (not classes or family_of(opened.model).classes(opened.model) < 2):
        return opened, images_of((*found[:-1], ()), options.images, input_size(opened.model), opened.preprocessing)
    if number_of_classes(opened.model) != len(classes):
        opened = open_model(options, len(classes), weights=weights, code=True)
    count = number_of_classes(opened.model)
    if count != len(classes):
        problem = f"{options.data} has {len(classes)} classes, but {options.model} was made for {count}"
        raise DataError(f"{problem}; use a model of these classes")
    if opened.classes not in (None, classes):
        _compare_classes(opened.classes, classes, options)
    if not opened.trained and not trains_head:
        advice = "train it first (spvit train, or --dense.epochs), or name trained weights with --checkpoint"
        raise ModelError(f"{options.model} has no trained weights for these {count} classes; {advice}")
    size = input_size(opened.model)
    return opened, images_of(found, options.images, size, opened.preprocessing)


def _compare_classes(own: tuple[str, ...], found: tuple[str, ...], options: RunCommand | EvaluateCommand) -> None:
    """Raise DataError when images have a model's classes in another order; warn when they have other names."""
    place = next(index for index, names in enumerate(zip(own, found)) if names[0] != names[1])
    difference = f"class {place} of {options.model} is {own[place]!r}, of {options.data} {found[place]!r}"
    if sorted(own) == sorted(found):
        raise DataError(
            f"{difference}: they are in another order; name the folders so that they sort as the model's do"
        )
    if not options.model.startswith(HUGGING_FACE):  # where the same classes often have other names
        problem = "if these are not the same, the model's outputs are not for these classes"
        logging.getLogger("spvit").warning("%s: %s", difference, problem)
