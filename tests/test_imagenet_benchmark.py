"""benchmarks/imagenet.py on a tiny folder of images with random weights: it runs, keeps to the MACs, and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.utils import save_image

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ["img_size=32", "patch_size=8", "embed_dim=48", "depth=2", "num_heads=3"]


@pytest.fixture(name="images")
def _images(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 60), ("validation", 6)):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                save_image(torch.rand(3, 32, 32, generator=generator), folder / f"{index}.png")
    return tmp_path


def run(images: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "imagenet.py", "--images", str(images), "--no-pretrained", "--model-args", *TINY]
    command += ["--count", "96", "--gallery", "40", "--workers", "0", *options]
    return subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_it_prunes_to_the_named_budgets(images: Path, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    done = run(images, "--models", "deit_base", "deit3", "--json", str(found))
    assert done.returncode == 0, done.stderr
    assert "CORP (2602.05243) 72.00" in done.stdout
    rows = json.loads(found.read_text())["rows"]
    assert [(row["budget"], row["judge"]) for row in rows] == [
        ("ffn 50%", "classifier"),
        ("70%", "nearest"),
        ("50%", "nearest"),
    ]
    assert [row["share"] for row in rows[1:]] == pytest.approx([0.7, 0.5], abs=0.02)
    assert 0.6 < rows[0]["share"] < 0.8
    assert all(0 <= row[name] <= 100 for row in rows for name in ("dense", "pruned"))


def test_an_unknown_model_is_refused(images: Path) -> None:
    done = run(images, "--models", "resnet50")
    assert done.returncode == 1
    assert "no case is of resnet50" in done.stderr
