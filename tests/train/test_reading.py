"""What is found out while images are read: how many cannot be, and how long steps wait for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spvit.checkpoint import Preprocessing
from spvit.errors import RunError
from spvit.train import reading
from spvit.train.data import ImageConfig, load_images
from spvit.train.loop import Phase, run_phase
from spvit.train.progress import PhaseProgress
from spvit.train.reading import Reading
from spvit.train.run_folder import RunFolder
from training import digits, image_folder, micro_host, run_in, short


class Notes(PhaseProgress):
    """Progress that keeps its notes."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def train(root: Path, folder: Path, epochs: int = 2, **settings: Any) -> Notes:
    """Train a micro model on a folder of images."""
    config = ImageConfig(**{"batch_size": 2, "skip_corrupt": True, "flip": 0.0, **settings})
    images = load_images(str(root), config, (3, 8, 8), Preprocessing())
    folder.mkdir(exist_ok=True)
    run, notes = run_in(folder, images), Notes()
    model = micro_host(in_chans=3, num_classes=2)
    object.__setattr__(run, "progress", notes)
    run_phase(Phase("dense", model, short(epochs)), run)
    return notes


def test_images_that_cannot_be_decoded_are_counted_in_every_epoch(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "pictures", size=40)
    cut = root / "train" / "dog" / "1.png", root / "val" / "cat" / "2.png"
    for path in cut:
        path.write_bytes(path.read_bytes()[:60])
    notes = train(root, tmp_path / "run", most_unreadable=0.2)
    found = [note for note in notes.notes if "could not be read" in note]
    assert [note.split(";")[0] for note in found] == [
        f"2 of 16 images of dense epoch {epoch} could not be read" for epoch in (1, 2)
    ]
    listed = json.loads((tmp_path / "run" / "unreadable.json").read_text())
    assert listed == {str(cut[0]): "its pixels, in dense epoch 2"}


def test_too_many_end_the_run_with_its_state_saved(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "pictures", size=40)
    bad = root / "train" / "dog" / "1.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:60])
    words = rf"1 of 16 images of dense epoch 1 could not be read, more than images.most_unreadable 0.10%: {bad}; repair"
    with pytest.raises(RunError, match=words):
        train(root, tmp_path / "run")
    assert RunFolder(tmp_path / "run").newest_state("dense").name == "epoch-0001.safetensors"
    bad.write_bytes(whole)
    assert train(root, tmp_path / "run").notes == ["dense epoch 2/2: accuracy 100.00%"]


def test_waiting_for_images_is_measured_and_said_where_it_takes_long(tmp_path: Path, monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(reading.time, "perf_counter", lambda: clock[0])

    def batches():
        for _ in range(3):
            clock[0] += 6.0
            yield torch.zeros(2, 1), torch.zeros(2), torch.tensor([], dtype=torch.int64)

    read, notes = Reading(batches(), torch.device("cpu")), Notes()
    shares = []
    for _ in read:
        clock[0] += 4.0
        shares.append(read.waited())
    assert shares == pytest.approx([0.6] * 3)
    images = digits()
    read.judge(images, len(images.validation), "search epoch 1", RunFolder(tmp_path), notes)
    assert notes.notes == [
        "search epoch 1: 60% of the time was spent waiting for images; read them in more processes (--images.workers, "
        "now 0)"
    ]
