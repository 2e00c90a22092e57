"""`spvit compress --dry-run`: what it says is what the run does, and nothing is written."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import spvit
from command import RECIPES, TINY
from spvit.benchmark import measure_latencies
from spvit.cli.main import main
from spvit.cli.plan import IMAGENET_TRAIN, duration, example_architecture
from spvit.search.network import make_searchable, search_record
from spvit.train.loop import Phase
from spvit.train.rehearsal import Rehearsal, TensorPeak, rehearse
from spvit.train.settings import LoopConfig
from training import digits, image_folder, micro_host, short

DEIT = str(RECIPES / "deit_tiny_1.0g.yaml")
DISTILLED = str(RECIPES / "deit_tiny_1.0g_distilled.yaml")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the options that shrink the DeiT-Ti recipe on six pictures a class; the working folder is empty."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    arguments = {**TINY["deit"], "num_classes": 2, "drop_path_rate": 0.1}
    torch.save(timm.create_model("deit_tiny_patch16_224", **arguments).state_dict(), tmp_path / "weights.pth")
    words = ["--model_args", json.dumps(arguments), "--checkpoint", str(tmp_path / "weights.pth"), "--macs", "70%"]
    words += ["--images.batch_size", "4", "--images.workers", "0", "--data"]
    return [*words, str(image_folder(tmp_path / "pictures", count=6))]


def said(text: str, row: str) -> list[str]:
    """Return the cells of a row of the plan's table."""
    return [cell.strip() for cell in re.search(rf"│ {row} +│(.*)│", text)[1].split("│")]


def test_plan_says_that_a_rate_never_ends_above_its_peak(capsys, small: list[str]) -> None:
    words = ["compress", "--recipe", DEIT, *small, "--search.epochs", "0", "--finetune.epochs", "1", "--dry-run"]
    assert main([*words, "--finetune.minimum_learning_rate", "1"]) == 0
    text = capsys.readouterr().out
    assert said(text, "learning rate, end") == said(text, "learning rate, peak") == [f"{5e-5 * 4 / 512:.3g}"]


def test_plan_says_what_the_run_then_does(capsys, small: list[str], tmp_path: Path, monkeypatch) -> None:
    words = ["compress", "--recipe", DEIT, *small, "--search.epochs", "2", "--finetune.epochs", "1"]
    assert main([*words, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert list(Path().iterdir()) == []
    assert said(text, "epochs") == ["2", "1"]
    assert said(text, "steps an epoch") == ["3", "3"]
    assert said(text, "steps") == ["6", "3"]
    assert said(text, "images seen") == ["24", "12"]
    assert said(text, "learning rate, peak") == [f"{5e-5 * 4 / 512:.3g}"] * 2
    assert said(text, "learning rate, end") == [f"{5e-5 * 4 / 512:.3g}", f"{5e-6 * 4 / 512:.3g}"]
    assert said(text, "gate learning rate") == ["0.001", ""]
    assert all(re.fullmatch(r"[\d.]+[kM]B", cell) for cell in said(text, "memory a device"))
    for part in ("batch: 4 a device x 1 = 4 a step", "images: 12 to train on, 12 to validate on", "70.0% of the dense"):
        assert part in text
    monkeypatch.setattr("spvit.cli.commands.measure_latencies", partial(measure_latencies, seconds=0.0))
    assert main([*words, "--log_every", "1"]) == 0
    lines = [json.loads(line) for line in Path("runs/deit_tiny_1.0g/metrics.jsonl").read_text().splitlines()]
    for phase, count in (("search", 6), ("finetune", 3)):
        assert max(line["step"] for line in lines if line["phase"] == phase and line["event"] == "step") == count
    kept = (tmp_path / "here" / "runs" / "deit_tiny_1.0g" / "config.yaml").read_text()
    assert "dry_run" not in kept
    expected = re.search(r"expected after: (\S+) macs", text)[1]
    pruned = spvit.surgery.pruned_record(spvit.load("runs/deit_tiny_1.0g")).architecture
    host = timm.create_model("deit_tiny_patch16_224", **TINY["deit"], num_classes=2)
    cost = search_record(make_searchable(host)).costs["macs"]
    assert float(expected[:-1]) * {"k": 1e3, "M": 1e6}[expected[-1]] == pytest.approx(cost.of(pruned), rel=0.01)


def test_plan_needs_neither_imagenet_nor_weights(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # The teacher of 84M parameters is left to the dense model here; its own weights would not be loaded either.
    arguments = {"drop_path_rate": 0.1, "depth": 2, "embed_dim": 48, "num_heads": 3}
    words = ["--model_args", json.dumps(arguments), "--images.batch_size", "2", "--macs", "70%"]
    assert main(["compress", "--recipe", DEIT, *words, "--finetune.distillation", "0.5", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "images: 1,281,167 to train on, 50,000 to validate on (imagenet is not there" in text
    assert said(text, "steps an epoch") == [f"{IMAGENET_TRAIN // 2:,}"] * 2
    assert "dense model" in said(text, "teacher")[1]
    assert "1000 classes" in text
    assert list(tmp_path.iterdir()) == []


def refused(capsys, words: str, *arguments: str) -> None:
    assert main(["compress", *arguments]) == 2
    problems = capsys.readouterr().err
    assert problems.startswith("spvit: ")
    assert len(problems.strip().splitlines()) == 1
    assert words in problems


def test_plan_refuses_what_the_run_would(capsys, small: list[str], tmp_path: Path) -> None:
    recipe = ["--recipe", DEIT, *small]
    refused(capsys, "'nowhere' is not a folder that exists", *recipe, "--data", "nowhere", "--dry-run")
    refused(capsys, "smallest reachable", *recipe, "--macs", "0.1%", "--dry-run")
    refused(capsys, "has 1000 classes, but the images have 2", "--recipe", DISTILLED, *small, "--dry-run")
    refused(capsys, "fewer than images.batch_size 64", *recipe, "--images.batch_size", "64", "--dry-run")
    untrained = ["--pretrained", "false", "--data", small[-1], "--dry-run"]
    refused(capsys, "no trained weights", "--recipe", DEIT, *untrained)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.yaml").write_text("# spvit compress\n")
    refused(capsys, "is in use", *recipe, "--output", str(tmp_path / "used"), "--dry-run")
    assert list(Path().iterdir()) == []
    (tmp_path / "empty").mkdir()
    refused(capsys, "0.1%", *recipe, "--output", str(tmp_path / "empty"), "--macs", "0.1%", "--dry-run")
    assert (tmp_path / "empty").is_dir()


def test_plan_of_a_run_to_resume_is_refused(capsys, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("# spvit compress\nmodel: test_vit\ndata: digits\noutput: x\n")
    refused(capsys, "plans a new run from its start", "--output", str(tmp_path), "--resume", "--dry-run")


def test_missing_images_are_an_error_of_the_run_itself(capsys, small: list[str]) -> None:
    refused(capsys, "data 'imagenet' is not a folder that exists", "--recipe", DEIT, *small[:-2], "--data", "imagenet")
    assert list(Path().iterdir()) == []


def test_peak_counts_tensors_while_they_live() -> None:
    known = torch.ones(1000)
    with TensorPeak([known]) as counter:
        known.add_(1)
        first = known.exp()  # 4,000 bytes
        second = first * 2
        del first
        third = second * 2
        del second, third
    assert counter.peak_bytes == 8000
    weight = torch.ones(1000, requires_grad=True)
    with TensorPeak([weight]) as counter:
        value = weight.exp().exp().exp()  # each stays for the backward pass
    assert counter.peak_bytes == 12_000
    del value


def test_memory_of_a_batch_is_foreseen_from_smaller_ones(tmp_path: Path) -> None:
    foreseen = rehearse(Phase("dense", micro_host(), short(1)), digits(batch_size=8), LoopConfig())
    images = digits(batch_size=64)
    assert (foreseen.batch, foreseen.device) == (8, "cpu")
    model = micro_host()
    optimizer = torch.optim.AdamW(model.parameters())
    batch, targets = torch.stack([images.validation[index][0] for index in range(64)]), torch.zeros(64).long()

    def step() -> None:
        nn.functional.cross_entropy(model(batch.clone()), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    kept = [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    with TensorPeak(kept) as counter:
        step()
    needed = sum(tensor.nbytes for tensor in kept) + counter.peak_bytes
    assert foreseen.memory_bytes(64) == pytest.approx(needed, rel=0.05)


def test_time_of_an_epoch_overlaps_reading_when_there_are_workers() -> None:
    figures = Rehearsal(10, 3, "cpu", 2.0, 4.0, 1.0, 0, 0, 0.0)
    assert figures.epoch_s(100, 20, workers=0) == 10 * 6 + 2 * 5
    assert figures.epoch_s(100, 20, workers=1) == 10 * 4 + 2 * 4
    assert [duration(value) for value in (8, 75, 720, 14_760, 126_500_000)] == [
        "8.0 s", "75 s", "12 min", "4.1 h", "1,464 days",
    ]  # fmt: skip


@pytest.mark.parametrize("share", ["90%", "40%", "25%"])
def test_example_architecture_costs_the_budget(share: str) -> None:
    host = micro_host(depth=4)
    architecture = example_architecture(host, {"macs": share}, 1)
    cost = search_record(make_searchable(host)).costs["macs"]
    assert cost.of(architecture) / cost.dense == pytest.approx(float(share[:-1]) / 100, rel=0.005)
