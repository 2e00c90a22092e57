"""The published architectures as models: built by name, known to timm, and counted as the publication counts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import spvit
from published_files import unfolded_params
from spvit.cli.main import main
from spvit.cost import count_params
from spvit.errors import ArchitectureError, ZooError
from spvit.hosts.rebuild import source_of
from spvit.models import ModelConfig, number_of_classes, open_model
from spvit.surgery import pruned_record
from spvit.zoo import host_name
from training import states_equal

timm = pytest.importorskip("timm")

DEIT, SWIN = "spvit_deit_tiny_patch16_224", "spvit_swin_tiny_patch4_window7_224"
# method.md section 6, the published count of parameters. DeiT-B 11.8G is not printed there: it is what the rule gives.
UNFOLDED = {
    DEIT: "4.87M",
    "spvit_deit_small_patch16_224": "16.12M",
    "spvit_deit_base_patch16_224": "46.21M",
    "spvit_deit_base_11g_patch16_224": "62.26M",
    SWIN: "26.31M",
    "spvit_swin_small_patch4_window7_224": "39.21M",
    "spvit_swin_base_patch4_window7_224": "68.03M",
}


@pytest.mark.parametrize("name", spvit.architectures())
def test_published_models_are_built_by_name(name: str) -> None:
    with torch.device("meta"):
        model = spvit.create_model(name)
        host = timm.create_model(host_name(name))
    architecture = spvit.architectures()[name]
    assert type(model) is type(host)
    assert pruned_record(model).architecture == architecture
    assert not pruned_record(model).folded
    assert f"{unfolded_params(host, architecture) / 1e6:.2f}M" == UNFOLDED[name]
    assert model(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, 1000)


def test_the_published_count_is_that_of_attention_s_own_projections_with_head_mix_and_norm() -> None:
    with torch.device("meta"):
        host = timm.create_model("deit_tiny_patch16_224")
    architecture = spvit.architectures()[DEIT]
    with torch.device("meta"):
        model = spvit.fold(spvit.create_model(DEIT))
    d, h, e = 192, 3, 64
    own, whole = 2 * d * e + d + e, 2 * (d * d + d) + 9 * h + 2 * e
    assert unfolded_params(host, architecture) == count_params(model) + 2 * (whole - own)


def test_timm_knows_them_once_the_zoo_is_imported() -> None:
    code = f"""
import spvit, timm
assert not timm.is_model("{DEIT}")
import spvit.zoo
assert timm.list_models("spvit_*") == sorted(spvit.architectures())
model = timm.create_model("{DEIT}", num_classes=5, drop_path_rate=0.1, img_size=64)
assert model.head.out_features == model.num_classes == 5
assert model.blocks[-1].drop_path1.drop_prob > 0.09
assert [type(block.attn).__name__ for block in model.blocks[:3]] == ["BottleneckConv", "BottleneckConv", "Attention"]
assert model.patch_embed.img_size == (64, 64)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


@pytest.mark.parametrize("create", [spvit.create_model, timm.create_model])
def test_weights_that_do_not_exist_are_refused(create: Any) -> None:
    with pytest.raises(ZooError, match=f"{DEIT} has no pretrained weights: .* pass pretrained=False, and load your"):
        create(DEIT, pretrained=True)
    with pytest.raises(ArchitectureError, match="the architecture has 12 blocks, but this VisionTransformer has 3"):
        create(DEIT, depth=3)


def test_unknown_names_are_refused() -> None:
    for call in (spvit.create_model, host_name):
        with pytest.raises(ZooError, match=f"published model 'spvit_best' is unknown, expected one of {DEIT}, "):
            call("spvit_best")


@pytest.mark.parametrize(("name", "size"), [(DEIT, 32), (SWIN, 64)])
def test_they_are_saved_and_loaded_like_any(name: str, size: int, tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=3, img_size=size, drop_path_rate=0.0).eval()
    loaded = spvit.load(spvit.save(model, tmp_path / "saved"))
    x = torch.randn(1, 3, size, size)
    assert torch.equal(loaded(x), model(x))
    assert pruned_record(loaded) == pruned_record(model)
    assert source_of(loaded)["name"] == host_name(name)


def test_they_are_opened_by_name(tmp_path: Path) -> None:
    small = {"img_size": 32}
    opened = open_model(ModelConfig(model=DEIT, model_args=small, pretrained=False), classes=4)
    assert number_of_classes(opened.model) == 4
    assert not opened.trained
    torch.save(opened.model.state_dict(), tmp_path / "weights.pth")
    again = open_model(ModelConfig(model=DEIT, model_args=small, checkpoint=str(tmp_path / "weights.pth")), classes=4)
    assert again.trained
    assert states_equal(again.model, opened.model)
    with pytest.raises(ZooError, match="has no pretrained weights"):
        open_model(ModelConfig(model=DEIT))


@pytest.mark.parametrize("words", [["profile", SWIN], ["profile", "--model", SWIN]])
def test_profile_prints_what_is_deployed(capsys: Any, words: list[str]) -> None:
    assert main(words) == 0
    text = capsys.readouterr().out
    rows = [re.split(r"\s*[│┃]\s*", line.strip()) for line in text.splitlines() if "skip" in line]
    assert [row[4] for row in rows] == ["29.53k", "194.4k"]  # with the norm that a published skip keeps


def test_profile_of_the_host_beside_a_published_architecture_says_the_same(capsys: Any) -> None:
    assert main(["profile", "deit_tiny_patch16_224", "--architecture", DEIT]) == 0
    beside = capsys.readouterr().out
    assert main(["profile", DEIT]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == beside.splitlines()[1:]
    assert all(total in beside for total in ("4.775M", "1.039G"))
