"""Every family of docs/models.md is exported at tiny size and answers alike, here or, pruned, in test_export."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import spvit
from spvit.architecture import dense

pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
REFUSED = {
    "VisionTransformerSAM": r"only 4D query, key, and value .*scaled_dot_product_attention.*; in blocks\.0\.attn"
}
"""What the exporter does not take, by family: the operation, and where it is."""
ELSEWHERE = {"VisionTransformer", "Beit", "Eva", "SwinTransformer", "vit_b_16", "ViT", "SimpleViT"}
ELSEWHERE |= {"Dinov2", "DINOv3ViT", "Siglip", "CLIP", "IJepa"}
"""Families that are exported pruned, by test_export."""


def families() -> dict[str, str]:
    """Return by family, a class or an architecture of transformers, the first name that works: `library:name`."""
    found: dict[str, str] = {}
    for section in (ROOT / "docs" / "models.md").read_text().split("\n## ")[1:]:
        library = section.partition("\n")[0]
        for cls, name in re.findall(r"^\| (.+?) \| \d+ \| .*? \| (?:yes|no) \| `(.+?)`", section, flags=re.MULTILINE):
            family = re.sub(r"(Vision)?(Model(WithProjection)?|Backbone|For[A-Z]\w+)", "", cls)
            if family not in ELSEWHERE:
                found.setdefault(family, f"{library}:{name}")
    return found


@pytest.fixture(name="tiny")
def _tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the module that builds a name of the page tiny, here with few blocks."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    tiny: Any = __import__("tiny_models")
    monkeypatch.setattr(tiny, "BLOCKS", 2)
    monkeypatch.setattr(tiny, "STAGES", (1, 1, 1, 1))
    return tiny


def whole(tiny: Any, name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return a tiny model whose weights have all moved, pruned to all that it has, and images for it."""
    built, generator = tiny.build(name), torch.Generator().manual_seed(0)
    for parameter in built.model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    images = torch.randn(7, *built.size, generator=generator)
    host = spvit.recognise(built.model, images[:3])
    return spvit.prune(host, dense([block.ffn.units for block in host.blocks])), images


@pytest.mark.parametrize("name", [name for family, name in families().items() if family not in REFUSED])
def test_a_family_of_the_page_is_exported(tiny: Any, name: str, tmp_path: Path) -> None:
    model, images = whole(tiny, name)
    done = spvit.export(model, tmp_path / "model.onnx", images=images)
    assert done.images == 7
    assert done.difference < 1e-4
    assert done.agreement > 0.999


@pytest.mark.parametrize("family", REFUSED)
def test_what_onnx_does_not_take_is_refused_with_its_place(tiny: Any, family: str, tmp_path: Path) -> None:
    assert family in (ROOT / "docs" / "export.md").read_text()
    model, images = whole(tiny, families()[family])
    with pytest.raises(spvit.ExportError, match=rf"{family} cannot be exported to onnx: {REFUSED[family]}"):
        spvit.export(model, tmp_path / "model.onnx", images=images)
