"""README and docs: their Python runs, their commands and recipes are accepted, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import spvit
from spvit.cli.main import parse

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
]
SMALL = {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 3, "mlp_ratio": 8, "num_classes": 10}


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page that are marked with exactly these words."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Return the words of every `spvit` command of a page, whatever launches it, without comments."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    every = [shlex.split(line, comments=True) for line in lines]
    return [words[words.index(name) + 1 :] for words in every for name in ("spvit", "spvit_command") if name in words]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=named)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_model = timm.create_model

    def small_model(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        """Stand in for a pre-trained model, which the tests neither download nor have minutes for."""
        return create_model(name, **{**(SMALL if pretrained else {}), **options})

    monkeypatch.setattr(timm, "create_model", small_model)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    classes = [f"class {index}" for index in range(SMALL["num_classes"])]
    spvit.save(create_model("vit_tiny_patch16_224", **SMALL), "runs/small", classes=classes)
    Image.new("RGB", (80, 60), "orange").save("cat.jpg")
    images = torch.randn(64, 3, 64, 64)
    names = {"images": images, "loader": [(images[:2], torch.tensor([3, 7]))] * 2}
    for code in blocks(page, "python"):
        exec(compile(code, page.name, "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python no-test")], ids=named)
def test_python_that_is_not_run_is_python(page: Path) -> None:
    for code in blocks(page, "python no-test"):
        compile(code, page.name, "exec")


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=named)
def test_commands_are_accepted(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "recipe.yaml").write_text("\n".join(blocks(page, "yaml")))
    for words in commands(page):
        if "--resume" not in words:  # it needs a run to continue
            assert parse(words)[0] == words[0]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=named)
def test_recipes_are_accepted(page: Path, tmp_path: Path) -> None:
    for recipe in blocks(page, "yaml"):
        (tmp_path / "recipe.yaml").write_text(recipe)
        _, options = parse(["compress", "--recipe", str(tmp_path / "recipe.yaml"), "--output", "out"])
        assert f"distillation: {options.finetune.distillation}" in recipe


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{named(page)} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(linked), f"{named(page)} links to {target}, which has no such heading"
