"""What the tests of training share: a micro model on the digits, and short settings."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import nn

from spvit.budget import Budget
from spvit.checkpoint import Preprocessing
from spvit.train.compress import Compressed, run_compress
from spvit.train.data import Images, load_images
from spvit.train.loop import Run
from spvit.train.run_folder import RunFolder
from spvit.train.settings import CompressConfig, ImageConfig, LoopConfig, PhaseConfig, SearchConfig

MODEL = "vit_tiny_patch16_224"
MODEL_ARGS = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
}
GREY = Preprocessing((0.5,), (0.5,), crop=1.0)


def micro_host(seed: int = 0, **more: object) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(MODEL, **{**MODEL_ARGS, **more})


def digits(**settings: object) -> Images:
    return load_images("digits", ImageConfig(**{"batch_size": 128, "flip": 0.0, **settings}), (1, 8, 8), GREY)


def short(epochs: int = 2, **settings: object) -> PhaseConfig:
    return PhaseConfig(**{"epochs": epochs, "learning_rate": 1e-3, "warmup_epochs": 0.2, **settings})


def short_search(epochs: int = 2, **settings: object) -> SearchConfig:
    return SearchConfig(**{"epochs": epochs, "learning_rate": 1e-3, "warmup_epochs": 0.2, **settings})


def run_in(folder: Path, images: Images, **settings: object) -> Run:
    return Run(images, RunFolder(folder), LoopConfig(**settings))


def compressed(host: nn.Module, macs: str, config: CompressConfig, folder: Path, images: Images) -> Compressed:
    """Compress a host to a budget in a folder, new or to continue."""
    return run_compress(host, Budget.parse(macs), config, Run(images, RunFolder(folder), config))


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def image_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 4, size: int = 12) -> Path:
    """Write a folder of small coloured pictures, `train/` and `val/` with a folder a class."""
    from PIL import Image

    for split in ("train", "val"):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                shade = (40 + 80 * label, 20 * index, 99)
                Image.new("RGB", (size, size), shade).save(folder / f"{index}.png")
    return root


def photographs(root: Path, count: int = 4, side: int = 64) -> Path:
    """Write crops of scikit-learn's two photographs as `train/` and `val/`, a folder a photograph."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    for label, (name, picture) in enumerate(zip(("china", "flower"), load_sample_images().images)):
        for split, held in (("train", 0), ("val", 1)):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                top, left = side * (2 * held + index % 2), (side + 8) * index
                crop = picture[top : top + side, left : left + side]
                Image.fromarray(crop).save(root / split / name / f"{label}{index}.jpg")
    return root
