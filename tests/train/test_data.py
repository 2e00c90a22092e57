"""Images: folders, torchvision data sets, digits; and what bad ones are told."""

from __future__ import annotations

import gzip
import logging
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spvit.checkpoint import Preprocessing
from spvit.errors import DataError
from spvit.train.data import ImageConfig, epoch_loader, load_images, mixup_of, training_loader, validation_loader
from training import GREY, digits, image_folder

SIZE = (3, 8, 8)


def load(source: str | Path, size: tuple[int, int, int] = SIZE, **settings: object):
    return load_images(str(source), ImageConfig(**{"batch_size": 2, **settings}), size, Preprocessing())


def test_digits_are_split_once_and_normalised() -> None:
    images = digits()
    assert (len(images.train), len(images.validation)) == (1437, 360)
    assert images.classes == tuple("0123456789")
    image, target = images.validation[0]
    assert image.shape == (1, 8, 8)
    assert 0 <= target < 10
    assert image.min() == -1.0
    counts = torch.bincount(torch.tensor([images.validation[i][1] for i in range(360)]))
    assert counts.min() >= 34


def test_image_folder_gives_both_splits(tmp_path: Path) -> None:
    images = load(image_folder(tmp_path))
    assert images.classes == ("cat", "dog")
    assert (len(images.train), len(images.validation)) == (8, 8)
    train, validation = training_loader(images), validation_loader(images)
    batch, targets = next(iter(train))
    assert batch.shape == (2, 3, 8, 8)
    assert targets.dtype == torch.int64
    assert sum(len(targets) for _, targets in validation) == 8


def test_preprocessing_of_the_settings_takes_precedence(tmp_path: Path) -> None:
    images = load(image_folder(tmp_path), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), crop=1.0)
    assert images.preprocessing == Preprocessing((0.0,) * 3, (1.0,) * 3, "bicubic", 1.0)
    image, _ = images.validation[0]
    assert image[0].mean().item() == pytest.approx(40 / 255, abs=1e-3)


def test_grey_model_gets_grey_images(tmp_path: Path) -> None:
    images = load_images(str(image_folder(tmp_path)), ImageConfig(batch_size=2), (1, 8, 8), GREY)
    assert images.train[0][0].shape == (1, 8, 8)


def test_held_out_images_leave_the_training_set(tmp_path: Path) -> None:
    whole, images = digits(), digits(held_out=100)
    assert (len(images.train), len(images.validation)) == (1337, 100)
    assert set(images.train.indices).isdisjoint(images.validation.indices)
    assert images.validation.indices == digits(held_out=100).validation.indices
    index = images.validation.indices[3]
    assert images.validation[3][1] == whole.train[index][1]
    with pytest.raises(DataError, match=r"held_out is 1437, but there are only 1437"):
        digits(held_out=1437)


def test_views_are_cropped_and_mirrored_and_nothing_else(tmp_path: Path) -> None:
    colours = {"color_jitter": 0.4, "auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 1.0}
    images = load(image_folder(tmp_path), **colours, held_out=2)
    assert images.views.indices == images.train.indices
    plain = load(tmp_path, held_out=2).train
    for (view, target), (expected, label), (augmented, _) in zip(images.views, plain, images.train):
        # The pictures are of one colour, so all crops of one are alike.
        assert torch.equal(view, expected)
        assert target == label
        assert not torch.equal(augmented, view)


def test_repeated_augmentation_puts_the_repeats_of_an_image_into_the_same_step(tmp_path: Path) -> None:
    images = digits(batch_size=30, repeated_augmentation=3, crop_scale=(0.2, 0.5))
    loaders = [epoch_loader(images, 3, process) for process in range(3)]
    for epoch in range(2):
        for loader in loaders:
            loader.sampler.begin(epoch)
        drawn = torch.tensor([[index for index, _ in loader.sampler] for loader in loaders])
        assert torch.equal(drawn[0], drawn[1])
        assert torch.equal(drawn[0], drawn[2])
        assert len(set(drawn[0].tolist())) == len(drawn[0]) == 450  # a third of 1,437, in whole batches
    assert [len(loader) for loader in loaders] == [15, 15, 15]
    (alone,) = [epoch_loader(images, 1, 0)]
    assert len(alone) == len(training_loader(images)) == 47
    drawn = [index for index, _ in alone.sampler]
    assert drawn[0::3] == drawn[1::3] == drawn[2::3]
    first, second, *_ = alone.sampler
    different = alone.dataset[first][0], alone.dataset[second][0]
    assert torch.equal(alone.dataset[first][0], different[0])
    assert not torch.equal(*different)
    with pytest.raises(DataError, match=r"fewer than images.batch_size 30 times 60 processes"):
        epoch_loader(images, 60, 0)


@pytest.mark.parametrize("name", ["rand-m10-n1", "rand-m10-n1-inc1", "augmix-m10", "original", "v0"])
def test_automatic_augmentation_never_keeps_no_bits(tmp_path: Path, name: str) -> None:
    """At magnitude 10 timm's posterizing keeps 0 bits, which Pillow 13 refuses."""
    images = load(image_folder(tmp_path), auto_augment=name)
    (augmentation,) = [
        part for part in images.train.transform.transforms if hasattr(part, "ops") or hasattr(part, "policy")
    ]
    groups = [getattr(augmentation, "ops", []), *getattr(augmentation, "policy", [])]
    found = [operation for group in groups for operation in group if operation.name.startswith("Posterize")]
    picture = Image.new("RGB", (4, 4), (200, 100, 50))
    for operation in found:
        operation.prob = 1.0
        assert operation(picture).getpixel((0, 0))[0] >= 128
    assert found


def test_mixup_makes_soft_targets() -> None:
    mixup = mixup_of(ImageConfig(mixup=0.8, cutmix=1.0), 10, 0.1)
    _, targets = mixup(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))
    assert targets.shape == (4, 10)
    assert targets.sum(1) == pytest.approx([1.0] * 4, abs=1e-5)
    assert mixup_of(ImageConfig(), 10, 0.1) is None


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: _rename(root / "val", root / "test"), "has no folder val/"),
        (
            lambda root: _empty(root / "train" / "cat"),
            r"train: Found no valid file for the classes cat; expected a folder of images \(.jpg",
        ),
        (lambda root: _rename(root / "val" / "dog", root / "val" / "cow"), "class 'dog' is in .*train but not in"),
        (lambda root: (root / "val" / "emu").mkdir(), "val: Found no valid file for the classes emu"),
        (
            lambda root: (_empty(root / "val", True), (root / "val").mkdir()),
            "val: Couldn't find any class folder in .*; expected a folder of images",
        ),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path: Path, spoil, words: str) -> None:
    root = image_folder(tmp_path / "pictures")
    spoil(root)
    with pytest.raises(DataError, match=words):
        load(root)


def _rename(old: Path, new: Path) -> None:
    old.rename(new)


def _empty(folder: Path, remove: bool = False) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    if remove:
        folder.rmdir()


def test_class_only_in_validation_is_refused(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    (root / "val" / "emu").mkdir()
    (root / "val" / "emu" / "0.png").write_bytes((root / "val" / "cat" / "0.png").read_bytes())
    with pytest.raises(DataError, match="class 'emu' is in .*val but not in .*train"):
        load(root)


@pytest.mark.parametrize("content", [b"not a picture", None])
def test_corrupt_image_is_reported_with_its_path(tmp_path: Path, content: bytes | None, caplog) -> None:
    root = image_folder(tmp_path)
    bad = root / "train" / "dog" / "1.png"
    bad.write_bytes(content if content is not None else bad.read_bytes()[:40])
    images = load(root)
    with pytest.raises(DataError, match=rf"image {bad} cannot be read .*skip_corrupt"):
        [images.train[index] for index in range(len(images.train))]
    kept = load(root, skip_corrupt=True)
    with caplog.at_level(logging.WARNING, logger="spvit"):
        seen = sum(len(targets) for _, targets in training_loader(kept))
    assert seen == 7
    assert str(bad) in caplog.text


def test_batch_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    root = image_folder(tmp_path, count=1)
    for path in root.glob("val/*/*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of the 2 images of a batch"):
        list(validation_loader(load(root, skip_corrupt=True)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 3, "mixup": 0.5}, "need an even one"),
        ({"repeated_augmentation": -1}, "repeated_augmentation is -1, expected 0 or more"),
        ({"mean": (0.5,)}, "images.mean has 1 values, but the model takes 3 channels"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, settings: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load(image_folder(tmp_path), **settings)


def test_normalisation_of_other_channels_is_refused() -> None:
    with pytest.raises(DataError, match="images.mean has 3 values, but the model takes 1 channels; give one a channel"):
        load("digits", size=(1, 8, 8))


def test_too_few_images_for_a_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are 8 training images, fewer than images.batch_size 16"):
        training_loader(load(image_folder(tmp_path), batch_size=16))


def test_unknown_data_is_refused() -> None:
    for name in ("no/such/folder", "NoSuchDataSet", "FakeData"):
        with pytest.raises(DataError, match=f"data '{name}' is not a folder that exists"):
            load(name)


def _write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def test_torchvision_data_set_is_read_from_local_files(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 6), ("t10k", 4)):
        _write_idx(raw / f"{name}-images-idx3-ubyte", np.full((count, 28, 28), 255))
        _write_idx(raw / f"{name}-labels-idx1-ubyte", np.arange(count))
    images = load("FashionMNIST", root=str(tmp_path), download=False)
    assert (len(images.train), len(images.validation), len(images.classes)) == (6, 4, 10)
    assert images.validation[3][1] == 3


def test_torchvision_data_set_that_is_not_there_says_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"torchvision's CIFAR10 is not under .*images.root"):
        load("CIFAR10", root=str(tmp_path), download=False)
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"cut short"))
    with pytest.raises(DataError, match=r"torchvision's MNIST is not under"):
        load("MNIST", root=str(tmp_path), download=False)


def test_workers_that_an_error_left_behind_do_not_keep_the_process_from_ending() -> None:
    program = """
import torch
from torch.utils.data import DataLoader
from spvit.train.signals import ignored_by_workers
left = iter(DataLoader(torch.arange(64), num_workers=2, worker_init_fn=ignored_by_workers))
next(left)
del type(left).__del__  # as where a traceback holds it
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0
