"""Compressing a model that a function of the user's returns, which only the command line may name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import spvit
from command import digits_recipe, measure_briefly, refused, run

OWN = """
from torch import nn
from spvit import Preprocessing

class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.image_size = 8
        self.embed, self.head = nn.Conv2d(1, 24, 2, stride=2), nn.Linear(24, 10)
        layer = nn.TransformerEncoderLayer(24, 3, 96, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x).flatten(2).mT).mean(1))

def prepared():
    return ViT(), Preprocessing((0.5,), (0.5,), crop=1.0)
"""


@pytest.mark.slow
def test_a_function_of_the_user_is_compressed_evaluated_and_continued(
    capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_briefly(monkeypatch)
    (tmp_path / "own_for_compress.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    settings, out = digits_recipe(tmp_path)(epochs=0, model_args={}), tmp_path / "out"
    words = ["compress", "--recipe", settings, "--macs", "60%", "--output", str(out)]
    code, text, problems = run(capsys, *words, "--model", "own_for_compress:prepared")
    assert (code, problems) == (0, "")
    assert f'load the model with spvit.load("{out}", host=the dense model)' in text
    model = spvit.load(out, host=sys.modules["own_for_compress"].ViT())
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert spvit.describe(out).preprocessing.mean == (0.5,)
    refused(capsys, "make the dense model and pass it: spvit.load(folder, host=model)", "profile", str(out))
    refused(capsys, "names code, which no file may; type it: --model own_for_compress:prepared", "compress",
            "--output", str(out), "--resume")  # fmt: skip
    code, _, problems = run(capsys, "compress", "--output", str(out), "--resume", "--model=own_for_compress:prepared")
    assert (code, problems) == (0, "")
