"""`spvit check`: tables and JSON of what was found, for models of every source, and one line for those refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import spvit
from command import refused, run
from spvit.architecture import FFN, Architecture, Attention, Block
from tiny import MIXED, make_host

TIMM = {"img_size": 64, "embed_dim": 24, "depth": 3, "num_heads": 3}
EVA = ("eva02_tiny_patch14_224", "--model-args", json.dumps({**TIMM, "img_size": 56}))
SWIN = {"img_size": 32, "window_size": 4, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 4]}


def found(capsys, *words: str) -> dict[str, Any]:
    """Return what `spvit check --json` prints."""
    code, text, problems = run(capsys, "check", *words, "--json")
    assert (code, problems) == (0, "")
    return json.loads(text)


def test_what_is_found_by_behaviour(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    about = found(capsys, *EVA)
    assert about["class"] == "timm.models.eva.Eva"
    assert about["found"] == "by what it does and verified"
    assert (about["input_size"], about["search"]) == ([3, 56, 56], "yes")
    assert about["params"] > 0 < about["macs"]
    (block,) = about["blocks"]
    assert block["blocks"] == "blocks.{0..2}"
    assert (block["tokens"], block["heads"], block["windows"]) == ("1 + 4 x 4", "3 x 8, on 24", "none")
    assert block["values"] == "qkv.weight from row 48; v_bias"
    assert block["FFN units"] == "64, gated"
    assert block["FFN"].endswith("blocks.{}.mlp.fc1 from row 64, then blocks.{}.mlp.fc2")
    assert block["may become"]["3 x 3 convolution"] == block["may become"]["fewer FFN units"] == "yes"
    monkeypatch.setenv("COLUMNS", "100")
    code, text, _ = run(capsys, "check", *EVA)
    assert code == 0
    for words in ("timm.models.eva.Eva, found by what it does and verified", "images 3 x 56 x 56, ", "blocks.{0..2}"):
        assert words in text
    for words in ("all blocks", "fewer heads", "search: yes"):
        assert words in text


def test_blocks_of_several_kinds_and_why_not(capsys) -> None:
    about = found(capsys, "swin_tiny_patch4_window7_224", "--model-args", json.dumps(SWIN))
    assert [block["blocks"] for block in about["blocks"]] == [f"layers.{i}.blocks.{j}" for i in (0, 1) for j in (0, 1)]
    assert about["blocks"][0]["windows"] == "16 of 16"
    assert about["found"] == "by its class"
    normed = found(capsys, "vit_tiny_patch16_224", "--model-args", json.dumps({**TIMM, "qk_norm": True}))
    may = normed["blocks"][0]["may become"]
    assert may["narrower values"] == "yes"
    assert may["narrower queries, keys"].startswith("no: queries and keys are normalised over the whole head")
    assert normed["blocks"][0]["acting on them"] == "q_norm, k_norm"
    second = found(capsys, "swinv2_tiny_window8_256", "--model-args", json.dumps(SWIN))["blocks"][0]
    assert second["may become"]["fewer heads"] == "yes"
    assert second["acting on them"] == "bias, cosine, learned scales"
    sam = {"img_size": 64, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3, "window_size": 3}
    whole = found(capsys, "samvit_base_patch16", "--model-args", json.dumps(sam))["blocks"][0]
    assert whole["may become"]["fewer heads"].startswith("no: the attention of ")
    assert whole["acting on them"].endswith("that no norm, table or argument explains: attention stays whole")


def test_folders_of_ours_and_of_hugging_face(capsys, tmp_path: Path) -> None:
    host = make_host("huggingface")
    host.save_pretrained(tmp_path / "hf")
    blocks = tuple(Block(Attention(kind), FFN(72, (0, 1))) for kind in MIXED)
    spvit.save(spvit.prune(host, Architecture(blocks)), tmp_path / "pruned")
    capsys.readouterr()
    dense, pruned = (found(capsys, name) for name in (f"hf:{tmp_path / 'hf'}", str(tmp_path / "pruned")))
    assert pruned["found"] == "by what it does and verified, before it was pruned"
    assert pruned["blocks"] == dense["blocks"]
    assert dense["blocks"][0]["blocks"] == "vit.layers.{0..3}"
    assert dense["classes"] == 7


OWN = """
import torch
from torch import nn

class ViT(nn.Module):
    def __init__(self, depth=2):
        super().__init__()
        self.embed, self.head = nn.Conv2d(1, 24, 8, stride=8), nn.Linear(24, 7)
        layer = nn.TransformerEncoderLayer(24, 3, 72, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x).flatten(2).mT).mean(1))

convolutional = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
"""


def test_models_of_the_user(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_for_check.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    about = found(capsys, "own_for_check:ViT", "--model-args", '{"depth": 3}', "--image-size", "32x48")
    assert [block["blocks"] for block in about["blocks"]] == ["encoder.layers.{0..2}"]
    assert about["blocks"][0]["tokens"] == "0 + 4 x 6"
    assert (about["input_size"], about["classes"]) == ([1, 32, 48], 7)
    refused(capsys, "own_for_check:ViT does not say what images it takes; give their size: --image-size 224x224",
            "check", "own_for_check:ViT")  # fmt: skip
    refused(capsys, "no self-attention was found", "check", "own_for_check:convolutional", "--image-size", "64")
    refused(capsys, "module own_for_check has no 'swin'", "check", "own_for_check:swin")


def test_what_cannot_be_checked_is_one_line(capsys) -> None:
    refused(capsys, "ResNet is not supported: no self-attention was found", "check", "test_resnet")
    refused(capsys, "neither a timm model", "check", "no_such_model")
    refused(capsys, "image_size is 64 by 64, expected height and width, such as 224x224", "check", *EVA, "--image-size",
            "64 by 64")  # fmt: skip
    vit = ("vit_tiny_patch16_224", "--model-args", json.dumps(TIMM))
    refused(capsys, "takes images of 3 x 64 x 64; other sizes are arguments: --model-args", "check", *vit,
            "--image-size", "96")  # fmt: skip
    refused(capsys, "its forward pass fails on images", "check", *EVA, "--channels", "1")
