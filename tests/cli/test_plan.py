"""`spvit compress --dry-run`: what it says is what the run does, and nothing is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import torch

import spvit
from command import RECIPES, TINY, measure_briefly, refused
from spvit.budget import human
from spvit.cli.main import main
from spvit.cli.plan import IMAGENET_TRAIN
from spvit.replacements.costs import network_costs
from training import image_folder

DEIT = str(RECIPES / "deit_tiny_1.0g.yaml")
DISTILLED = str(RECIPES / "deit_tiny_1.0g_distilled.yaml")
UNITS = {"k": 1e3, "M": 1e6}


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
    assert said(text, "images") == ["12", "12"]
    assert said(text, "images a step") == ["4", "4"]
    assert said(text, "epochs") == ["2", "1"]
    assert said(text, "steps an epoch") == ["3", "3"]
    assert said(text, "steps") == ["6", "3"]
    assert said(text, "learning rate, peak") == [f"{5e-5 * 4 / 512:.3g}"] * 2
    assert said(text, "learning rate, end") == [f"{5e-5 * 4 / 512:.3g}", f"{5e-6 * 4 / 512:.3g}"]
    assert said(text, "gate learning rate") == ["0.001", ""]
    assert all(re.fullmatch(r"[\d.]+[kM]B", cell) for cell in said(text, "memory a device"))
    assert all(re.fullmatch(r"\d:\d\d:\d\d", cell) for cell in said(text, "time"))
    measure_briefly(monkeypatch)
    assert main([*words, "--log_every", "1"]) == 0
    lines = [json.loads(line) for line in Path("runs/deit_tiny_1.0g/metrics.jsonl").read_text().splitlines()]
    for phase, count in (("search", 6), ("finetune", 3)):
        assert max(line["step"] for line in lines if line["phase"] == phase and line["event"] == "step") == count
    kept = (tmp_path / "here" / "runs" / "deit_tiny_1.0g" / "config.yaml").read_text()
    assert "dry_run" not in kept
    before, after = re.search(r"macs: (\S+) before, (\S+) \(70.0%\) after", text).groups()
    host = timm.create_model("deit_tiny_patch16_224", **TINY["deit"], num_classes=2)
    cost = network_costs(host)["macs"]
    pruned = spvit.surgery.pruned_record(spvit.load("runs/deit_tiny_1.0g")).architecture
    assert before == human(cost.dense)
    assert float(after[:-1]) * UNITS[after[-1]] == pytest.approx(cost.of(pruned), rel=0.01)


def test_plan_needs_neither_imagenet_nor_weights(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # The teacher of 84M parameters is left to the dense model here; its own weights would not be loaded either.
    arguments = {"drop_path_rate": 0.1, "depth": 2, "embed_dim": 48, "num_heads": 3}
    words = ["--model_args", json.dumps(arguments), "--images.batch_size", "2", "--macs", "70%"]
    assert main(["compress", "--recipe", DEIT, *words, "--finetune.distillation", "0.5", "--dry-run"]) == 0
    text, problems = capsys.readouterr()
    assert "imagenet is not there; noise stands for its pictures" in problems
    assert said(text, "images") == [f"{IMAGENET_TRAIN:,}"] * 2
    assert said(text, "steps an epoch") == [f"{IMAGENET_TRAIN // 2:,}"] * 2
    assert said(text, "teacher") == ["", "dense model"]
    assert list(tmp_path.iterdir()) == []


def test_plan_of_a_budget_in_parameters_estimates_the_macs(capsys, small: list[str]) -> None:
    words = [*small, "--macs", "null", "--params", "60%", "--search.epochs", "0", "--finetune.epochs", "1"]
    assert main(["compress", "--recipe", DEIT, *words, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"macs: \S+ before, about \S+ \(60.0%\) after", text)
    assert re.search(r"params: \S+ before, \S+ \(60.0%\) after", text)


def test_memory_grows_with_the_batch_and_adds_up(capsys, small: list[str]) -> None:
    def memory(batch: int) -> float:
        words = [*small, "--images.batch_size", str(batch), "--search.epochs", "0", "--finetune.epochs", "1"]
        assert main(["compress", "--recipe", DEIT, *words, "--dry-run"]) == 0
        (cell,) = said(capsys.readouterr().out, "memory a device")
        return float(cell[:-2]) * UNITS[cell[-2]]

    four, eight, twelve = (memory(batch) for batch in (4, 8, 12))
    assert twelve - eight == pytest.approx(eight - four, rel=0.02)
    host = timm.create_model("deit_tiny_patch16_224", **TINY["deit"], num_classes=2)
    weights = sum(parameter.nbytes for parameter in host.parameters())
    # weights, gradients and two moments stay, and every image adds what its backward pass needs
    assert four - (eight - four) == pytest.approx(4 * weights, rel=0.02)


def test_plan_refuses_what_the_run_would(capsys, small: list[str], tmp_path: Path) -> None:
    plan = ["compress", "--recipe", DEIT, *small, "--dry-run"]
    refused(capsys, "'nowhere' is not a folder that exists", *plan, "--data", "nowhere")
    refused(capsys, "smallest reachable", *plan, "--macs", "0.1%")
    refused(capsys, "has 1000 classes, but the images have 2", *plan, "--recipe", DISTILLED, *small)
    refused(capsys, "fewer than images.batch_size 64", *plan, "--images.batch_size", "64")
    untrained = ["--pretrained", "false", "--data", small[-1], "--dry-run"]
    refused(capsys, "no trained weights", "compress", "--recipe", DEIT, *untrained)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.yaml").write_text("# spvit compress\n")
    refused(capsys, "is in use", *plan, "--output", str(tmp_path / "used"))
    assert list(Path().iterdir()) == []
    (tmp_path / "empty").mkdir()
    refused(capsys, "0.1%", *plan, "--output", str(tmp_path / "empty"), "--macs", "0.1%")
    assert (tmp_path / "empty").is_dir()


def test_plan_of_a_run_to_resume_is_refused(capsys, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("# spvit compress\nmodel: test_vit\ndata: digits\noutput: x\n")
    words = ["compress", "--output", str(tmp_path), "--resume", "--dry-run"]
    refused(capsys, "plans a new run from its start", *words)


def test_missing_images_are_an_error_of_the_run_itself(capsys, small: list[str]) -> None:
    words = ["compress", "--recipe", DEIT, *small[:-2], "--data", "imagenet"]
    refused(capsys, "data 'imagenet' is not a folder that exists", *words)
    assert list(Path().iterdir()) == []
