"""The census: what passes, what is refused, and that a fault is seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import spvit

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
VIT, SWIN, CNN = "timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224", "timm:repvit_m0_9"


@pytest.fixture(name="census")
def _census(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return __import__("census")


@pytest.mark.slow
def test_it_writes_a_page_of_what_works_and_what_is_refused(tmp_path: Path) -> None:
    page, found = tmp_path / "models.md", tmp_path / "found.json"
    names = [VIT, "timm:vit_small_patch16_224", SWIN, CNN]
    command = [sys.executable, "census.py", "--only", *names, "--jobs", "1", "--output", page, "--json", found]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "timm: 4 names: 3 passes, 1 refused, 0 crash" in done.stdout
    outcomes = {outcome["name"]: outcome for outcome in json.loads(found.read_text())}
    assert {name: outcome["result"] for name, outcome in outcomes.items()} == {
        name.partition(":")[2]: "refused" if name == CNN else "passes" for name in names
    }
    assert outcomes["vit_tiny_patch16_224"]["detail"] == "narrower"
    assert outcomes["vit_tiny_patch16_224"]["saved"]
    assert "in windows" in outcomes["swin_tiny_patch4_window7_224"]["detail"]
    text = page.read_text()
    assert "| VisionTransformer | 2 | narrower | yes | `vit_small_patch16_224`, `vit_tiny_patch16_224` |" in text
    assert f"RepVit (1), for example `repvit_m0_9`: {outcomes['repvit_m0_9']['detail']}" in text
    assert "Faults" not in text


def test_an_unknown_name_is_refused(census: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["census.py", "--only", "timm:resnet50"])
    with pytest.raises(SystemExit, match="2"):
        census.main()
    assert "no name is like timm:resnet50" in capsys.readouterr().err


def test_faults_are_crashes_and_name_the_stage(census: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(name: str) -> None:
        while True:
            pass

    with monkeypatch.context() as changed:
        changed.setattr(census.tiny_models, "build", endless)
        (outcome,) = census.outcomes_of([VIT], limit=0.001)
    assert (outcome.result, outcome.detail) == ("crash", "build: OutOfTime: took more than 0.001 s")
    monkeypatch.setattr(census, "macs_of", lambda model, x: 0)
    (outcome,) = census.outcomes_of([VIT], limit=60)
    assert outcome.result == "crash"
    assert outcome.detail.startswith("counts_exactly: ContractError: ")
    assert "0 counted" in outcome.detail
    monkeypatch.setattr(spvit, "recognise", lambda model, images: 1 / 0)
    (outcome,) = census.outcomes_of([VIT], limit=60)
    assert outcome.detail == "recognise: ZeroDivisionError: division by zero"
    assert "Faults of spvit" in __import__("census_page").page([outcome])


def test_models_that_are_one_at_tiny_size_are_known(census: Any) -> None:
    kind_of = census.tiny_models.kind_of
    assert kind_of("timm:vit_small_patch16_224") == kind_of("timm:vit_base_patch16_224")
    assert kind_of("timm:vit_base_patch16_224") != kind_of("timm:vit_base_patch16_clip_quickgelu_224")
    assert kind_of("timm:vit_base_patch16_224") != kind_of("timm:vit_base_patch16_siglip_224")


@pytest.mark.parametrize("name", [VIT, SWIN, "timm:vit_base_patch16_dinov3", "timm:vit_small_r26_s32_224"])
def test_a_tiny_model_takes_images_of_the_size_that_its_configuration_names(census: Any, name: str) -> None:
    built = census.tiny_models.build(name)
    assert built.model.pretrained_cfg["input_size"] == built.size
    assert built.model(torch.zeros(1, *built.size)).shape == (1, census.tiny_models.CLASSES)
