"""Where images come from: folders, tar files (WebDataset shards), data sets of torchvision and Hugging Face, digits.

All of them are sequences of (source, class), which any process can read at any place: an epoch's order, and a run that
continues within it, do not depend on where the images lie.
"""

import inspect
import json
import logging
import math
import os
import tarfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.datasets
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from rich.console import Console
from torch.utils.data import Subset
from torchvision.datasets.folder import IMG_EXTENSIONS

from spvit.checkpoint import make_folder, replace_atomically
from spvit.errors import DataError, first_line
from spvit.train.image_files import Stored, part_of
from spvit.train.progress import PhaseProgress
from spvit.train.settings import ImageConfig

DIGITS = "digits"
DIGITS_HELD_OUT = 360
VALIDATED, MOST_VALIDATED = 0.1, 5000
"""Share and number of the images of a folder without labels that validate."""
SHARDS, HUGGING_FACE, TORCH = "wds/", "hfds/", "torch/"
PARTS = {"ImageNet": ("train", "val"), "Places365": ("train-standard", "val")}
"""Of torchvision's data sets, those whose parts are not called train and test."""
Items = Any  # a sequence of (path, `Stored`, array or PIL image; class)
Found = tuple[Items, Items, tuple[str, ...]]  # training and validation items, and the names of the classes

logger = logging.getLogger("spvit")


class Files(Sequence[tuple[str | Stored, int]]):
    """Image files with their classes: a path each, or a tar file, a name in it, and where it starts and ends.

    They are packed, because each process that reads images would copy a list of a million objects.
    """

    def __init__(self, files: Iterable[tuple[str | Path | tuple[object, ...], int]]) -> None:
        packed, ends, targets = bytearray(), array("q"), array("q")
        for file, target in files:
            packed += os.fsencode("\0".join(map(str, file)) if isinstance(file, tuple) else file)
            ends.append(len(packed))
            targets.append(target)
        self.packed, self.ends, self.targets = bytes(packed), np.array(ends), np.array(targets)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        place = range(len(self))[index]
        start = self.ends[place - 1] if place else 0
        path, *member = os.fsdecode(self.packed[start : self.ends[place]]).split("\0")
        if not member:
            return path, int(self.targets[place])
        name, *limits = member
        return Stored(f"{path}:{name}", partial(part_of, path, *map(int, limits)), path), int(self.targets[place])


def find_images(source: str, config: ImageConfig) -> Found:
    """Return the images of a source; of images without labels no classes.

    A folder has `train/` and `val/`, with a folder a class in each, or tar files of such; or the tables of
    iNaturalist; or images without labels, anywhere in it: then a tenth of them validates. `wds/` begins the place of
    WebDataset shards, `hfds/` the name of a Hugging Face data set, `torch/` or nothing that of one of torchvision's;
    `digits` is one too. Raises DataError when there are none, or they do not fit each other.
    """
    path = Path(source)
    if source == DIGITS:
        return _digits()
    if path.is_dir():
        return _folder(path, config)
    if source.startswith(SHARDS) or (path.suffix == ".tar" and path.is_file()):
        return _shards(source.removeprefix(SHARDS), config)
    if source.startswith(HUGGING_FACE):
        return _hugging_face(source.removeprefix(HUGGING_FACE))
    if source.startswith(("tfds/", "hfids/")):
        kind = source.partition("/")[0]
        advice = f"use {HUGGING_FACE}NAME, or tar files with {SHARDS}FOLDER"
        raise DataError(f"data {source!r}: {kind} gives images in its order only, so a run could not go on; {advice}")
    return _torchvision(source, config)


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

    @staticmethod
    def make_dataset(directory: Any, class_to_idx: Any, *_: Any, **__: Any) -> list[tuple[str, int]]:
        """Return the images and their classes, in order. Raises FileNotFoundError when a class has none."""
        found = [
            (os.path.join(path, name), index)
            for own, index in class_to_idx.items()
            for path, names in sorted(_walk(os.path.join(directory, own)))
            for name in sorted(filter(_is_picture, names))
        ]
        if empty := sorted(set(class_to_idx.values()) - {index for _, index in found}):
            names = [name for name, index in class_to_idx.items() if index in empty]
            raise FileNotFoundError(f"Found no valid file for the classes {', '.join(names)}")
        return found


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and those below it, with their files. A link is followed unless it leads to where it came from."""
    for path, folders, names in os.walk(folder, followlinks=True):
        target = Path(path).resolve()
        if os.path.islink(path) and any(place.resolve().is_relative_to(target) for place in Path(path).parents):
            logger.warning("%s is left out: it links to a folder that it is in", path)
            folders.clear()
        else:
            yield path, names


def _is_picture(path: str) -> bool:
    name = Path(path).name
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def _folder(folder: Path, config: ImageConfig) -> Found:
    """Return the images of `train/` and `val/`, with a folder a class in each; without such folders, without labels."""
    parts = [folder / split for split in ("train", "val")]
    absent = [part.name for part in parts if not part.is_dir()]
    if any(next(place.glob("*.tar"), None) for place in ([folder] if absent else parts)):
        return _shards(str(folder), config)
    tables = [sorted(folder.glob(f"{part.name}*.json")) for part in parts]
    if absent and [len(found) for found in tables] == [1, 1]:
        return _inaturalist(folder, *(found[0] for found in tables))
    if len(absent) == 1:
        raise DataError(f"{folder} has no folder {absent[0]}/; expected train/ and val/, or neither without labels")
    if absent:
        images = _images_under(folder)
        if len(images) < 2:
            problem = f"{folder} has no folders train/ and val/, and {len(images)} images"
            raise DataError(f"{problem}; expected both, with a folder a class in each, or images without labels")
        return (*_split(images), ())
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
    _check_same(folder, splits["train"].classes, splits["val"].classes)
    return Files(splits["train"].samples), Files(splits["val"].samples), tuple(splits["train"].classes)


def _check_same(place: object, train: Sequence[str], validation: Sequence[str]) -> None:
    for here, there, own, other in (("train", "val", train, validation), ("val", "train", validation, train)):
        missing = sorted(set(own) - set(other))
        if missing:
            raise DataError(f"class {missing[0]!r} is in {place}/{here} but not in {place}/{there}; they must match")


def _images_under(folder: Path) -> Files:
    """Return the image files of a folder and its folders, in order of their names, without a class."""
    found = []
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(path, name) for name in names if _is_picture(name)]
    return Files((path, 0) for path in sorted(found, key=lambda path: path.split(os.sep)))


def _split(items: Any) -> tuple[Items, Items]:
    """Return the items to train on and a tenth held out, by a fixed permutation: the same in every run."""
    held_out = min(MOST_VALIDATED, math.ceil(VALIDATED * len(items)))
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()
    return Subset(items, order[held_out:]), Subset(items, order[:held_out])


def _inaturalist(folder: Path, *tables: Path) -> Found:
    """Return the images that iNaturalist's tables name, such as train2018.json and val2018.json."""
    parts = []
    try:
        for table in tables:
            content = json.loads(table.read_text(encoding="utf-8"))
            names = {item["id"]: str(item["name"]) for item in content["categories"]}
            files = {item["id"]: folder / item["file_name"] for item in content["images"]}
            place = {identity: index for index, identity in enumerate(sorted(names))}
            parts.append(
                Files((files[item["image_id"]], place[item["category_id"]]) for item in content["annotations"])
            )
    except (ValueError, KeyError, TypeError) as error:
        expected = "expected one of iNaturalist's, with images, annotations and categories"
        raise DataError(f"{table} is no table of images ({type(error).__name__}: {error}); {expected}") from error
    return parts[0], parts[1], tuple(names[identity] for identity in sorted(names))


def _shards(place: str, config: ImageConfig) -> Found:
    """Return the images of tar files, here or in an object store, whose names or folders say `train` or `val`.

    The class of an image is a number in a file of the same name that ends in .cls, or else its folder.
    """
    try:
        tars = _local(place, config)
        images, progress = {}, PhaseProgress(Console(stderr=True))
        with progress.bar("tar files", len(tars)), ProcessPoolExecutor(min(len(tars), os.cpu_count() or 1)) as pool:
            for name, own in zip(tars, pool.map(_images_of, tars.values())):
                images[name] = own
                progress.step()
    except Exception as error:  # whatever a store's library raises, it means the same to the user
        raise DataError(f"the tar files of {place} cannot be read ({first_line(error)})") from error
    said = {name: "train" if "train" in name else "val" if "val" in name else "" for name in images}
    parts: Any = [
        [image for name in images if said[name] == part for image in images[name]] for part in ("train", "val")
    ]
    every = [image for own in images.values() for image in own]
    labels: Any = {label for _, label in every}
    if len({type(label) for label in labels}) > 1:
        raise DataError(f"some images of {place} have classes and some have none, expected all or none")
    if len(labels) < 2:
        parts = [[(file, 0) for file, _ in own] for own in parts]
        train, validation = map(Files, parts) if all(parts) else _split(Files((file, 0) for file, _ in every))
        return train, validation, ()
    if not all(parts):
        found = f"{len(parts[0])} images in tar files named train and {len(parts[1])} in those named val"
        raise DataError(f"{place} has {found}, expected some in both, or none with classes")
    names: list[Any] = sorted(labels)
    if isinstance(names[0], int):
        names = list(range(names[-1] + 1))
    else:
        _check_same(place, [label for _, label in parts[0]], [label for _, label in parts[1]])
    index = {name: number for number, name in enumerate(names)}
    train, validation = (Files((file, index[label]) for file, label in own) for own in parts)
    return train, validation, tuple(map(str, names))


def _local(place: str, config: ImageConfig) -> dict[str, str]:
    """Return the tar files of a place by their names below it; those of an object store are copied here first."""
    from spvit.train.processes import processes  # brings Accelerate, which who only reads images needs not

    system, path = url_to_fs(place)
    found = sorted(name for name in system.find(path) if name.endswith(".tar"))
    if not found:
        raise FileNotFoundError("there are none that end in .tar")
    local = {os.path.relpath(name, os.path.dirname(path) if name == path else path): name for name in found}
    if isinstance(system, LocalFileSystem):
        return local
    with processes().local_main_process_first(), ThreadPoolExecutor() as threads:
        return dict(zip(local, threads.map(partial(_copied, system, Path(config.root)), found)))


def _copied(system: Any, folder: Path, name: str) -> str:
    """Return the local copy of a file of an object store, which is made unless it is there."""
    copy = folder / name.lstrip("/")
    if not copy.is_file() or copy.stat().st_size != system.size(name):
        logger.warning("copying %s to %s", name, copy)
        make_folder(copy.parent)
        replace_atomically(copy, lambda temporary: system.get_file(name, str(temporary)))
    return str(copy)


def _images_of(tar: str) -> list[tuple[tuple[object, ...], int | str | None]]:
    """Return where the images of a tar file are, each with its class: a number, a folder or, of neither, None."""
    images, numbers = [], {}
    with tarfile.open(tar, "r:") as found:
        opened: Any = found
        for member in opened:
            opened.members = []  # or it keeps them all
            folder, name = os.path.split(member.name)
            key = folder, name.partition(".")[0]
            if member.isreg() and name.endswith(".cls"):
                numbers[key] = int(opened.extractfile(member).read())
            elif member.isreg() and _is_picture(name):
                images.append((key, (tar, member.name, member.offset_data, member.offset_data + member.size)))
    return [(file, numbers.get(key, os.path.basename(key[0]) or None)) for key, file in images]


@dataclass(frozen=True)
class Rows(Sequence[tuple[Any, int]]):
    """Rows of a Hugging Face data set: the image of each, and its class."""

    table: Any
    image: str
    label: str | None

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        row = self.table[index]
        stored, name = row[self.image], f"{row[self.image]['path'] or ''} in row {index}"
        source = stored["path"] if stored["bytes"] is None else Stored(name, partial(BytesIO, stored["bytes"]))
        return source, 0 if self.label is None else row[self.label]


def _hugging_face(name: str) -> Found:
    """Return the images of a data set of the Hugging Face hub, or of a folder that its library reads."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{HUGGING_FACE} needs a package; install it with: pip install datasets") from error
    try:
        parts = datasets.load_dataset(*name.split(":"))
    except Exception as error:  # of many kinds, without a base
        advice = "its name is that on huggingface.co, or with a configuration NAME:CONFIGURATION"
        raise DataError(f"the data set {name} cannot be loaded ({first_line(error)}); {advice}") from error
    validation = next((part for part in ("validation", "valid", "val", "test") if part in parts), None)
    if "train" not in parts or validation is None:
        raise DataError(f"the data set {name} has the parts {', '.join(parts)}; expected train and validation or test")
    features = parts["train"].features
    images, labels = (
        [key for key, kind in features.items() if isinstance(kind, wanted)]
        for wanted in (datasets.Image, datasets.ClassLabel)
    )
    if not images:
        raise DataError(f"the data set {name} has no column of images, but {', '.join(features)}")
    label = labels[0] if labels else None
    train, held_out = (
        Rows(parts[part].cast_column(images[0], datasets.Image(decode=False)), images[0], label)
        for part in ("train", validation)
    )
    return train, held_out, () if label is None else tuple(features[label].names)


def _torchvision(source: str, config: ImageConfig) -> Found:
    known = {f"{TORCH}{name.lower()}": name for name in torchvision.datasets.__all__}
    name = known.get(source.replace("_", "").lower(), source)  # a word alone may be a folder that is not there
    made = getattr(torchvision.datasets, name, None)
    parameters = inspect.signature(made.__init__).parameters if inspect.isclass(made) else {}
    if made is None or "root" not in parameters or not ({"train", "split"} & set(parameters)):
        raise DataError(
            f"data {source!r} is not a folder that exists, not the name of a torchvision data set with a training and "
            f"a test part (such as CIFAR10 or FashionMNIST), and not {DIGITS!r}; {HUGGING_FACE}NAME is one of Hugging "
            f"Face, {SHARDS}FOLDER one of tar files"
        )
    parts: Any = ({"train": True}, {"train": False})
    if "train" not in parameters:
        first = "trainval" if parameters["split"].default == "trainval" else "train"
        parts = [{"split": part} for part in PARTS.get(name, (first, "test"))]
    download = {"download": config.download} if "download" in parameters else {}
    try:
        train, validation = (made(root=config.root, **part, **download) for part in parts)
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(
            f"torchvision's {name} is not under {config.root!r} and could not be downloaded ({first_line(error)}); "
            "put its files there, or name their folder with --images.root"
        ) from error
    classes = getattr(train, "classes", None) or range(max(int(target) for _, target in train) + 1)
    return train, validation, tuple(str(item) for item in classes)
