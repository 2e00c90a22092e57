"""Headers of image files are looked at before a run: bad ones are named or left out, known ones not opened again."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from spvit.checkpoint import Preprocessing
from spvit.cli.main import main
from spvit.errors import DataError
from spvit.train import headers
from spvit.train.data import ImageConfig, load_images
from spvit.train.headers import checked
from spvit.train.loop import Run
from training import GREY, MODEL, MODEL_ARGS, image_folder, run_in

SIZE = (3, 8, 8)


def run_on(root: Path, folder: Path, **settings: object) -> Run:
    config = ImageConfig(**{"batch_size": 2, "most_unreadable": 0.5, **settings})
    folder.mkdir(exist_ok=True)
    return run_in(folder, load_images(str(root), config, SIZE, Preprocessing()))


def spoiled(root: Path) -> list[Path]:
    """Write a folder of 17 images of which five are bad, each in another way; return these."""
    cat = image_folder(root) / "train" / "cat"
    for index in range(3):
        (cat / f"{index}.png").unlink()
    os.mkfifo(cat / "0.png")
    (cat / "1.png").symlink_to(root / "nowhere.png")
    (cat / "two\nlines.png").write_bytes(b"not a picture")
    Image.new("I", (8, 8)).save(cat / "wide.tif")
    (root / "val" / "dog" / "3.png").write_bytes(b"")
    return [cat / "0.png", cat / "1.png", cat / "two\nlines.png", cat / "wide.tif", root / "val" / "dog" / "3.png"]


def test_bad_files_are_named_before_a_run(tmp_path: Path) -> None:
    bad = spoiled(tmp_path / "pictures")
    with pytest.raises(DataError, match=r"^5 of 17 images cannot be read: image .*; remove them, or pass") as refusal:
        checked(run_on(tmp_path / "pictures", tmp_path / "run"))
    assert "\n" not in str(refusal.value)
    for path in bad:
        assert path.name.replace("\n", r"\n") in str(refusal.value)
    assert not any((tmp_path / "run").iterdir())
    run = run_on(tmp_path / "pictures", tmp_path / "run", check=False)
    assert checked(run) is run


def test_no_more_than_ten_are_named(tmp_path: Path) -> None:
    for path in image_folder(tmp_path / "pictures", count=8).glob("*/cat/*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="16 of 32 images cannot be read") as refusal:
        checked(run_on(tmp_path / "pictures", tmp_path / "run"))
    assert str(refusal.value).count(".png") == 10


def test_bad_files_are_left_out_if_asked_for_and_stay_out(tmp_path: Path) -> None:
    bad = spoiled(tmp_path / "pictures")
    run = run_on(tmp_path / "pictures", tmp_path / "run", skip_corrupt=True)
    left = checked(run).images
    assert (len(left.train), len(left.views), len(left.validation)) == (5, 5, 7)
    assert all(item is not None for part in (left.train, left.views, left.validation) for item in part)
    listed = json.loads((tmp_path / "run" / "unreadable.json").read_text())
    assert set(listed) == set(map(str, bad))
    bad[-1].write_bytes((bad[-1].parent / "0.png").read_bytes())  # mended, but the run goes on with what it began with
    assert len(checked(run).images.validation) == 7
    with pytest.raises(DataError, match=r"4 of 17 images cannot be read, more than images.most_unreadable 10.00%"):
        checked(run_on(tmp_path / "pictures", tmp_path / "other", skip_corrupt=True, most_unreadable=0.1))


def test_known_files_are_not_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_on(image_folder(tmp_path / "pictures"), tmp_path / "run")
    opened: list[str] = []
    look = headers.check_header
    monkeypatch.setattr(headers, "check_header", lambda file: (opened.append(file), look(file)))
    assert checked(run) is run
    assert len(opened) == 16
    opened.clear()
    checked(run)
    assert opened == []
    changed = tmp_path / "pictures" / "train" / "dog" / "2.png"
    Image.new("RGB", (30, 30)).save(changed)
    checked(run)
    assert opened == [str(changed)]
    opened.clear()
    run.folder.headers.write_bytes(b"damaged" * 9)
    checked(run)
    assert len(opened) == 16


def test_images_that_are_not_in_files_are_not_looked_at(tmp_path: Path) -> None:
    images = load_images("digits", ImageConfig(), (1, 8, 8), GREY)
    run = run_in(tmp_path / "run", images)
    assert checked(run) is run
    own = replace(images, train=torch.utils.data.TensorDataset(torch.zeros(2, 1)))
    assert checked(replace(run, images=own)).images is own
    assert not (tmp_path / "run").exists()


def test_the_command_refuses_before_it_trains_and_leaves_nothing(tmp_path: Path, capsys) -> None:
    spoiled(tmp_path / "pictures")
    arguments = {**MODEL_ARGS, "in_chans": 3, "num_classes": 2}
    words = ["train", "--model", MODEL, "--model_args", json.dumps(arguments), "--pretrained", "false"]
    words += ["--data", str(tmp_path / "pictures"), "--output", str(tmp_path / "run"), "--images.batch_size", "2"]
    assert main([*words, "--dense.epochs", "1"]) == 2
    assert "5 of 17 images cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    words += ["--images.skip_corrupt", "true", "--images.most_unreadable", "0.5"]
    assert main([*words, "--dense.epochs", "1"]) == 0
    assert "5 of 17 images cannot be read and are left out" in capsys.readouterr().out.replace("\n", " ")
