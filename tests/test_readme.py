"""The README's Python runs as it stands, and its recipe is one that the command accepts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

import spvit
from spvit.budget import Budget
from spvit.cli.main import parse

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_own_loop_compresses_deit_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    assert "pretrained=True" in code
    torch.manual_seed(0)
    batch = (torch.randn(2, 3, 224, 224), torch.tensor([3, 7]))
    names = {"loader": [batch, batch]}
    exec(compile(code.replace("pretrained=True", "pretrained=False"), "README.md", "exec"), names)
    small, architecture = names["small"], names["architecture"]
    assert architecture.kinds() == ("msa",) * 12
    assert small(batch[0]).shape == (2, 1000)
    assert torch.equal(spvit.load(tmp_path / "small")(batch[0]), small(batch[0]))


def test_recipe_is_accepted(tmp_path: Path) -> None:
    (recipe,) = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    name, options = parse(["compress", "--recipe", str(tmp_path / "recipe.yaml"), "--output", "out"])
    assert name == "compress"
    assert options.budget() == Budget.parse(macs="1.5G")
    assert options.finetune.distillation == yaml.safe_load(recipe)["finetune"]["distillation"] == 0.5


def test_commands_named_are_commands() -> None:
    named = set(re.findall(r"spvit (compress|[a-z]+) --", README))
    assert named <= {"compress", "train", "search", "finetune", "evaluate", "profile", "demo"}
    assert {"compress", "evaluate", "profile"} <= named
