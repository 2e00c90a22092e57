"""`spvit predict` and `spvit.transform`: files of every kind are read and prepared as validation images are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import spvit
from command import refused, run
from spvit.train.data import load_images
from spvit.train.settings import ImageConfig
from training import image_folder

CLASSES = ("cat [0]", "dog")
PREPROCESSING = spvit.Preprocessing((0.3, 0.4, 0.5), (0.2, 0.3, 0.4), "bilinear", crop=0.8)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return the folder of a saved model of two classes."""
    torch.manual_seed(0)
    args = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 2}
    host = timm.create_model("vit_tiny_patch16_224", **args)
    return spvit.save(host, tmp_path / "model", preprocessing=PREPROCESSING, classes=CLASSES)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder of pictures that are easily read in another way than in training."""
    folder = image_folder(tmp_path / "data", count=2, size=40) / "val" / "cat"
    shades = np.linspace(0, 65535, 48 * 40).reshape(40, 48).astype(np.uint16)
    Image.fromarray(shades).save(folder / "grey16.png")
    colours = np.random.default_rng(0).integers(0, 256, (40, 52, 4), dtype=np.uint8)
    Image.fromarray(colours).save(folder / "alpha.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter when shown
    Image.fromarray(colours[..., :3]).save(folder / "turned.jpg", exif=turned)
    Image.fromarray(colours[..., :3]).quantize(16).save(folder / "palette.png")
    return folder


def test_images_are_read_as_in_training(model: Path, pictures: Path) -> None:
    about = spvit.describe(model)
    images = load_images(str(pictures.parents[1]), ImageConfig(), (3, 32, 32), PREPROCESSING)
    prepare = spvit.transform(about)
    for index, (path, _) in enumerate(images.validation.items):
        assert torch.equal(prepare(path), images.validation[index][0]), path
    assert torch.equal(spvit.transform(spvit.load(model), PREPROCESSING)(path), prepare(Image.open(path)))
    grey = prepare(pictures / "grey16.png")
    assert len(grey[0].unique()) > 100  # and not all but the darkest clipped to white
    with pytest.raises(spvit.DataError, match="image nowhere.png cannot be read .No such file"):
        prepare("nowhere.png")


def test_classes_of_files_and_folders(capsys, model: Path, pictures: Path) -> None:
    inside = sorted(str(path) for path in pictures.iterdir())
    (pictures / "notes.txt").write_text("no image, and not taken for one in a folder")
    code, text, problems = run(capsys, "predict", str(model), str(pictures), inside[0])
    assert (code, problems) == (0, "")
    assert [line.partition(": ")[0] for line in text.splitlines()] == [*inside, inside[0]]
    code, text, _ = run(capsys, "predict", str(model), inside[0], "--json", "--top", "1")
    (found,) = json.loads(text)
    image = spvit.transform(spvit.describe(model))(inside[0])
    probabilities = spvit.load(model)(image[None]).softmax(1)[0]
    (best,) = found["classes"]
    assert (found["image"], best["class"]) == (inside[0], CLASSES[probabilities.argmax()])
    assert best["probability"] == pytest.approx(float(probabilities.max()), abs=1e-6)


def test_what_is_no_image_is_named_and_the_others_go_on(capsys, model: Path, pictures: Path) -> None:
    (pictures / "bad.png").write_text("no image")
    (pictures / "short.jpg").write_bytes((pictures / "turned.jpg").read_bytes()[:900])
    names = [str(pictures / name) for name in ("bad.png", "short.jpg", "nowhere.png", "alpha.png")]
    code, text, problems = run(capsys, "predict", str(model), *names)
    assert code == 2
    assert text.startswith(f"{names[-1]}: ")
    assert text.count("\n") == 1
    *lines, last = problems.splitlines()
    assert [line.partition(" (")[0] for line in lines] == [f"spvit: image {name} cannot be read" for name in names[:-1]]
    assert last == "spvit: 3 of 4 images could not be read"


def test_what_cannot_be_predicted_is_refused(capsys, model: Path, pictures: Path, tmp_path: Path) -> None:
    image = str(pictures / "alpha.png")
    host = spvit.load(model)
    host.reset_classifier(0)
    spvit.save(host, tmp_path / "backbone")
    refused(capsys, "has no classes to predict; for its features see", "predict", str(tmp_path / "backbone"), image)
    refused(capsys, "has no trained weights", "predict", "vit_tiny_patch16_224", image, "--pretrained", "false")
    refused(capsys, "top is 0", "predict", str(model), image, "--top", "0")
    refused(capsys, "required: FILES", "predict", str(model))
    (tmp_path / "empty").mkdir()
    refused(capsys, "holds no image files", "predict", str(model), str(tmp_path / "empty"))
