"""Where images come from: tar files, here and in a store, tables of iNaturalist, data sets of Hugging Face."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from spvit.checkpoint import Preprocessing
from spvit.errors import DataError
from spvit.train.data import ImageConfig, epoch_loader, load_images
from spvit.train.headers import checked
from spvit.train.sources import find_images
from training import image_folder, run_in


def load(source: str | Path, **settings: object):
    return load_images(str(source), ImageConfig(**{"batch_size": 2, **settings}), (3, 8, 8), Preprocessing())


def encoded(shade: int, kind: str = "png") -> bytes:
    found = io.BytesIO()
    Image.new("RGB", (12, 12), (shade, 20, 99)).save(found, kind)
    return found.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as opened:
        for name, content in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            opened.addfile(about, io.BytesIO(content))


def shards(root: Path, labelled: bool = True) -> Path:
    """Write three WebDataset shards of eight images in four classes, of which the third has none in it."""
    for name, keys in (
        ("toy-train-000", range(3)),
        ("toy-train-001", range(3, 6)),
        ("toy-validation-000", range(6, 8)),
    ):
        files = {}
        for key in keys:
            files[f"{key:04d}.jpg"] = encoded(30 * key, "jpeg")
            files[f"{key:04d}.json"] = b"{}"
            if labelled:
                files[f"{key:04d}.cls"] = str((0, 1, 3)[key % 3]).encode()
        write_tar(root / f"toy-{name}.tar", files)
    return root


@pytest.mark.parametrize("prefix", ["", "wds/"])
def test_shards_of_webdataset_are_read_in_any_order(tmp_path: Path, prefix: str) -> None:
    images = load(f"{prefix}{shards(tmp_path / 'shards')}")
    assert images.classes == ("0", "1", "2", "3")
    assert (len(images.train), len(images.validation)) == (6, 2)
    assert [images.train[index][1] for index in (5, 0, 4)] == [3, 0, 1]
    red = [images.train.transform(Image.new("RGB", (12, 12), (30 * key, 20, 99)))[0].mean().item() for key in (5, 0)]
    assert [images.train[key][0][0].mean().item() for key in (5, 0)] == pytest.approx(red, abs=0.05)
    loader = epoch_loader(images, 1, 0)
    drawn = []
    for start in (0, 0, 4):
        loader.sampler.begin(7, start)
        drawn.append([targets for _, targets, _ in loader])
    assert torch.equal(torch.cat(drawn[0]), torch.cat(drawn[1]))
    assert torch.equal(drawn[0][2], drawn[2][0])  # it goes on within an epoch


def test_shards_without_classes_have_no_labels(tmp_path: Path) -> None:
    images = load(shards(tmp_path / "named", labelled=False))
    assert (len(images.train), len(images.validation), images.classes) == (6, 2, ())
    write_tar(tmp_path / "0000.tar", {f"{key}.png": encoded(key) for key in range(11)})
    images = load(tmp_path / "0000.tar")
    assert (len(images.train), len(images.validation), images.classes) == (9, 2, ())


def test_tar_files_of_a_folder_a_class(tmp_path: Path) -> None:
    for split in ("train", "val"):
        files = {f"{split}/{name}/.{name}.png": b"hidden" for name in ("cat", "dog")}
        files |= {f"{split}/{name}/{name}.{key}.png": encoded(key) for name in ("dog", "cat") for key in range(2)}
        write_tar(tmp_path / f"{split}.tar", files)
    images = load(tmp_path)
    assert (len(images.train), len(images.validation), images.classes) == (4, 4, ("cat", "dog"))
    assert [images.train[index][1] for index in range(4)] == [1, 1, 0, 0]


def test_bad_images_in_a_tar_file_are_named(tmp_path: Path) -> None:
    shards(tmp_path / "shards")
    write_tar(tmp_path / "shards" / "toy-train-002.tar", {"junk.png": b"junk", "junk.cls": b"0"})
    (tmp_path / "run").mkdir()
    words = r"1 of 9 images cannot be read: image .*toy-train-002\.tar:junk\.png cannot be read \(it is no image"
    with pytest.raises(DataError, match=words):
        checked(run_in(tmp_path / "run", load(tmp_path / "shards")))


def test_shards_of_an_object_store_are_copied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(shards(tmp_path / "shards")), "/bucket/toy", recursive=True)
    images = load("wds/memory://bucket/toy", root=str(tmp_path / "data"))
    assert (len(images.train), len(images.validation), len(images.classes)) == (6, 2, 4)
    assert len(list((tmp_path / "data").rglob("*.tar"))) == 3
    monkeypatch.setattr(type(store), "get_file", None)  # what is there is not copied again
    assert load("wds/memory://bucket/toy", root=str(tmp_path / "data")).train[0][1] == 0


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"train.tar": {"a/0.png": encoded(0), "b/0.png": encoded(0)}}, "2 images in tar files named train and 0 in"),
        ({"train.tar": {"a/0.png": b""}, "val.tar": {"0.png": b""}}, "some images of .* have classes and some have"),
        (
            {"train.tar": {"a/0.png": b"", "b/0.png": b""}, "val.tar": {"a/0.png": b""}},
            "class 'b' is in .*/train but not in .*/val",
        ),
        ({"train.tar": {"0.png": b"", "0.cls": b"cat"}}, r"cannot be read \(invalid literal for int"),
    ],
)
def test_tar_files_that_do_not_fit_are_refused(tmp_path: Path, files: dict, words: str) -> None:
    for name, content in files.items():
        write_tar(tmp_path / name, content)
    with pytest.raises(DataError, match=words):
        load(tmp_path)


def test_places_without_tar_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.tar").write_bytes(b"no tar file")
    for source, words in (
        ("wds/no/such/place", r"the tar files of no/such/place cannot be read \(there are none that end in \.tar\)"),
        (f"wds/{tmp_path}", "cannot be read"),
        ("wds/nowhere://bucket", r"the tar files of nowhere://bucket cannot be read \(Protocol not known"),
        ("tfds/mnist", "tfds gives images in its order only, so a run could not go on; use hfds/NAME, or tar files"),
    ):
        with pytest.raises(DataError, match=words):
            load(source)


def test_tables_of_inaturalist(tmp_path: Path) -> None:
    """The layout of 2018 and 2019: train_val2018/SUPER/CATEGORY/FILE, and a table for each part."""
    names = {5: "Aves", 7477: "Plantae"}
    categories = [{"id": identity, "name": str(identity), "supercategory": name} for identity, name in names.items()]
    for split, count in (("train", 3), ("val", 1)):
        table: dict[str, list] = {"images": [], "annotations": [], "categories": categories}
        for category, name in names.items():
            for number in range(count):
                path = f"train_val2018/{name}/{category}/{split}{number}.png"
                (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / path).write_bytes(encoded(number))
                identity = len(table["images"]) + 100
                table["images"].append({"id": identity, "file_name": path, "width": 12, "height": 12})
                table["annotations"].append({"id": identity, "image_id": identity, "category_id": category})
        (tmp_path / f"{split}2018.json").write_text(json.dumps(table))
    images = load(tmp_path)
    assert (len(images.train), len(images.validation), images.classes) == (6, 2, ("5", "7477"))
    assert [images.validation[index][1] for index in range(2)] == [0, 1]
    (tmp_path / "val2018.json").write_text("{}")
    with pytest.raises(DataError, match=r"val2018.json is no table of images \(KeyError: 'categories'\); expected one"):
        load(tmp_path)


def test_data_sets_of_hugging_face(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    root = image_folder(tmp_path / "pictures")
    images = load(f"hfds/{root}")
    assert (len(images.train), len(images.validation), images.classes) == (8, 8, ("cat", "dog"))
    assert [target for _, target in images.validation] == [0] * 4 + [1] * 4
    with pytest.raises(DataError, match=r"the data set .*nothing cannot be loaded \(.*; its name is that on"):
        load(f"hfds/{tmp_path / 'nothing'}")


def test_the_package_of_hugging_face_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="hfds/ needs a package; install it with: pip install datasets"):
        load("hfds/cifar100")


def test_torchvision_goes_by_timms_names_too(tmp_path: Path) -> None:
    for name in ("torch/cifar100", "CIFAR100"):
        with pytest.raises(DataError, match="torchvision's CIFAR100 is not under"):
            load(name, root=str(tmp_path), download=False)
    with pytest.raises(DataError, match="data 'imagenet' is not a folder that exists"):
        load("imagenet")
    for name in ("torch/fashion_mnist", "torch/imagenet"):
        with pytest.raises(DataError, match="torchvision's (FashionMNIST|ImageNet) is not under"):
            load(name, root=str(tmp_path), download=False)


def test_a_million_files_are_kept_small(tmp_path: Path) -> None:
    from spvit.train.sources import Files

    paths = [f"/images/train/n{label:04d}/{label}_{number}.JPEG" for label in range(10) for number in range(10)]
    files = Files((path, index // 10) for index, path in enumerate(paths))
    assert [files[index] for index in range(100)] == [(path, index // 10) for index, path in enumerate(paths)]
    assert files[-1] == (paths[-1], 9)
    assert len(files.packed) + files.ends.nbytes + files.targets.nbytes < 100 * (len(paths[-1]) + 17)
    odd = Files([(Path("/ü\udcff/a"), 0)])
    assert odd[0] == ("/ü\udcff/a", 0)
    assert find_images(str(image_folder(tmp_path)), ImageConfig())[0].targets.dtype == np.int64


def test_a_link_to_a_folder_that_it_is_in_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = image_folder(tmp_path)
    before = find_images(str(root), ImageConfig())
    (root / "train" / "dog" / "loop").symlink_to("../..")
    (tmp_path / "more").mkdir()
    (root / "train" / "cat").rename(tmp_path / "more" / "cat")  # one elsewhere is followed, but not round and round
    (root / "train" / "cat").symlink_to(tmp_path / "more" / "cat")
    (tmp_path / "more" / "cat" / "back").symlink_to(root / "train" / "cat")
    found = find_images(str(root), ImageConfig())
    assert [list(part) for part in found[:2]] == [list(part) for part in before[:2]]
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"{root}/train/{name} is left out: it links to a folder that it is in" for name in ("cat/back", "dog/loop")
    ]
