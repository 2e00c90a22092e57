"""Checkpoints of others: every published layout against a naive forward pass of its own keys, and bad files."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import spvit
from command import refused, run
from golden import golden, make_layer, needs_golden
from published_files import (
    DEIT,
    MLP,
    SWIN,
    SWIN_PREFIXES,
    deit_logits,
    deit_state,
    swin_logits,
    swin_state,
)
from spvit.checkpoint import Preprocessing, describe
from spvit.cli.convert import indicated_architecture, model_name, read_published, rebuild
from spvit.cost import count_params
from spvit.errors import CheckpointError
from spvit.models import ModelConfig, open_model
from spvit.surgery import pruned_record
from spvit.zoo import architectures
from tiny import CLASSES, assert_close, assert_differ, images, logits

UNFOLDED = ("conv3", "conv1", "skip", "msa")
FOLDED = ("folded3", "folded1", "skip", "msa")
DENSE = ("dense",) * 4
SHIFTED = ("msa", "msa", "conv3", "conv1")  # a shifted block of attention, and convolutions of the second stage
NARROW = {"deit": (50, 72, 1, 13), "swin": (50, 72, 100, 1)}
FAMILIES: dict[str, tuple[Callable[..., dict[str, Tensor]], Callable[[dict[str, Tensor], Tensor], Tensor]]] = {
    "deit": (deit_state, deit_logits),
    "swin": (swin_state, swin_logits),
}


def host_of(family: str, **options: Any) -> torch.nn.Module:
    name, settings = {
        "deit": ("deit_tiny_patch16_224", DEIT),
        "distilled": ("deit_tiny_distilled_patch16_224", DEIT),
        "swin": ("swin_tiny_patch4_window7_224", SWIN),
    }[family]
    return timm.create_model(name, **{**settings, "num_classes": CLASSES, **options})


def write(path: Path, state: Any, **beside: Any) -> Path:
    torch.save({"model": state, **beside}, path)
    return path


def indicators(path: Path, units: dict[str, list[float]]) -> Path:
    """Write an FFN indicator file, values as the published code leaves them: 1 - s + s for those kept."""
    rounded = torch.tensor(1.0) - torch.tensor(0.62) + torch.tensor(0.62)
    vectors = {f"{key}.mlp.assigned_indicator_index": torch.tensor(value) * rounded for key, value in units.items()}
    return write(path, vectors)


def every_third(widths: dict[str, int]) -> dict[str, list[float]]:
    return {
        key: [float(unit % 3 == index % 3) for unit in range(width)]
        for index, (key, width) in enumerate(widths.items())
    }


DEIT_WIDTHS = {f"blocks.{index}": MLP for index in range(4)}
SWIN_WIDTHS = dict(zip(SWIN_PREFIXES, (MLP, MLP, 2 * MLP, 2 * MLP)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kinds", [UNFOLDED, FOLDED, SHIFTED, DENSE], ids=lambda kinds: kinds[0])
@pytest.mark.parametrize("family", FAMILIES)
def test_published_forward_passes(family: str, kinds: tuple[str, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    make, naive = FAMILIES[family]
    dense = kinds[0] == "dense"
    state = make(kinds, dtype=dtype) if dense else make(kinds, NARROW[family], dtype=dtype)
    published = read_published(write(tmp_path / "file.pth", state, epoch=3, model_ema={"a": torch.ones(1)}))
    host = host_of(family)
    before = {key: value.clone() for key, value in host.state_dict().items()}
    model = rebuild(published, host)
    assert all(torch.equal(value, before[key]) for key, value in host.state_dict().items())
    assert not model.training
    x = images(host.to(dtype))
    expected = naive(state, x)
    assert_close(logits(model, x), expected)
    if dense:
        assert published.form == "dense"
        assert pruned_record(model) is None
        return
    assert published.form == ("folded" if kinds is FOLDED else "unfolded")
    record = pruned_record(model)
    assert record.architecture.widths() == NARROW[family]
    assert record.architecture.kinds() == tuple(kind.replace("folded", "conv") for kind in kinds)
    assert record.architecture.skip_rule == ("normalised_input" if "skip" in kinds else "zero")
    assert_close(logits(spvit.fold(model), x), expected)
    loaded = spvit.load(spvit.save(model, tmp_path / "saved"))
    assert torch.equal(logits(loaded, x), logits(model, x))


def test_distilled_and_biasless_files(tmp_path: Path) -> None:
    state = deit_state(("msa", "conv3", "conv1", "msa"), distilled=True)
    published = read_published(write(tmp_path / "file.pth", state))
    x = images(host_of("deit").double())
    assert_close(logits(rebuild(published, host_of("distilled")), x), deit_logits(state, x))
    zeros = {key: torch.zeros_like(value) for key, value in state.items() if key.endswith((".qk.bias", ".v.bias"))}
    without = {key: value for key, value in state.items() if key not in zeros}
    published = read_published(write(tmp_path / "without.pth", without))
    expected = deit_logits({**state, **zeros}, x)
    assert_close(logits(rebuild(published, host_of("distilled", qkv_bias=False)), x), expected)


def test_kernel_order_and_temperature_of_swin_matter(tmp_path: Path) -> None:
    kinds = ("conv3", "msa", "conv1", "msa")
    state = swin_state(kinds)
    published = read_published(write(tmp_path / "file.pth", state))
    host = host_of("swin")
    x = images(host.double())
    right = logits(rebuild(published, host), x)
    assert_close(right, swin_logits(state, x))
    for change in ({"columns": tuple(range(9))}, {"temperature": 0.01}):
        wrong = dataclasses.replace(published, layout=dataclasses.replace(published.layout, **change))
        assert_differ(logits(rebuild(wrong, host), x), right)


@needs_golden
@pytest.mark.parametrize("kind", UNFOLDED)
def test_golden_deit_attention_through_a_file(kind: str, tmp_path: Path) -> None:
    deit = golden("deit_attention")
    layer = make_layer(deit)  # the stored batch norms are those after a training pass; these are the ones before
    parts = {"msa": ("qk.", "v.", "proj."), "skip": ()}.get(kind, ("v.", "proj.", "head_probs"))
    part = (
        {key[2:]: value for key, value in deit.items() if key[2:].startswith(parts) and key.startswith("w.")}
        if parts
        else {}
    )
    if kind.startswith("conv"):
        part |= {
            f"bn_{kind[-1]}x{kind[-1]}.{key}": value
            for key, value in layer.get_submodule(f"bn{kind[-1]}").state_dict().items()
        }
    host = host_of("deit", img_size=80, embed_dim=48, depth=1)
    state = {key: value for key, value in host.state_dict().items() if ".attn." not in key}
    state |= {f"blocks.0.attn.{key}": value for key, value in part.items()}
    model = rebuild(read_published(write(tmp_path / "file.pth", state)), host)
    with torch.no_grad():
        out = model.blocks[0].attn(deit["x"])
    assert_close(out, deit["finetune.skip" if kind == "skip" else f"eval.{kind}"])


@needs_golden
@pytest.mark.parametrize("kind", ["conv3", "conv1", "msa"])
def test_golden_swin_attention_through_a_file(kind: str, tmp_path: Path) -> None:
    swin = golden("swin_attention")
    other = {"conv3": ("bn_1x1", "qk", "relative"), "conv1": ("bn_3x3", "qk", "relative"), "msa": ("bn", "head_probs")}
    part = {
        key[2:]: value for key, value in swin.items()
        if key.startswith("w.") and key != "w.alpha" and not key[2:].startswith(other[kind])
    }  # fmt: skip
    size = {"img_size": 56, "patch_size": 4, "depths": (1,), "num_heads": (3,)} | {"embed_dim": 48}
    host = host_of("swin", **size)
    state = {key: value for key, value in host.state_dict().items() if ".attn." not in key}
    state |= {f"layers.0.blocks.0.attn.{key}": value for key, value in part.items()}
    attention = rebuild(read_published(write(tmp_path / "file.pth", state)), host).layers[0].blocks[0].attn
    with torch.no_grad():
        if kind == "msa":
            assert_close(attention(swin["x"], mask=swin["mask"]), swin["eval.msa"])
        else:
            attention.grid.height = attention.grid.width = 8
            assert_close(attention(swin["map.x"]), swin[f"map.{kind}"])


@pytest.mark.parametrize("family", FAMILIES)
def test_indicators_say_which_units_a_fine_tuned_checkpoint_kept(family: str, tmp_path: Path) -> None:
    widths = {"deit": DEIT_WIDTHS, "swin": SWIN_WIDTHS}[family]
    kept = every_third(widths)
    make, naive = FAMILIES[family]
    state = make(UNFOLDED, [int(sum(vector)) for vector in kept.values()])
    published = read_published(write(tmp_path / "file.pth", state))
    host = host_of(family)
    x = images(host.double())
    model = rebuild(published, host, read_published(indicators(tmp_path / "ffn.pth", kept)))
    assert_close(logits(model, x), naive(state, x))
    for index, block in enumerate(pruned_record(model).architecture.blocks):
        assert block.ffn.units == tuple(range(index % 3, block.ffn.width, 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_indicators_prune_a_dense_checkpoint(family: str, tmp_path: Path) -> None:
    make, naive = FAMILIES[family]
    state = make(DENSE)
    kept = every_third({"deit": DEIT_WIDTHS, "swin": SWIN_WIDTHS}[family])
    host = host_of(family)
    x = images(host.double())
    published = read_published(write(tmp_path / "file.pth", state))
    model = rebuild(published, host, read_published(indicators(tmp_path / "ffn.pth", kept)))
    for key, vector in kept.items():
        state[f"{key}.mlp.fc2.weight"] = state[f"{key}.mlp.fc2.weight"] * torch.tensor(vector)
    assert_close(logits(model, x), naive(state, x))
    assert pruned_record(model).architecture.kinds() == ("msa",) * 4


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_indicators_of_a_published_architecture_bring_its_attention(name: str, tmp_path: Path) -> None:
    known = architectures()[f"spvit_{name}"]
    prefixes = [f"blocks.{index}" for index in range(12)]
    if name.startswith("swin"):
        prefixes = [f"layers.{stage}.blocks.{block}" for stage in range(4) for block in range((2, 2, 6, 2)[stage])]
    vectors = {}
    for prefix, block in zip(prefixes, known.blocks):
        vectors[prefix] = [0.0] * (block.ffn.width - len(block.ffn.units)) + [1.0] * len(block.ffn.units)
    found = indicated_architecture(read_published(indicators(tmp_path / "ffn.pth", vectors)))
    assert (found.kinds(), found.widths(), found.skip_rule) == (known.kinds(), known.widths(), known.skip_rule)
    assert found != known
    assert found.blocks[0].ffn.units[-1] == known.blocks[0].ffn.width - 1


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "deit_small_patch16_224",
        "deit_base_patch16_224",
        "swin_tiny_patch4_window7_224",
        "swin_small_patch4_window7_224",
        "swin_base_patch4_window7_224",
    ],
)
def test_models_are_told_by_their_shapes(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        keys = {key: value.shape for key, value in timm.create_model(name).state_dict().items()}
    state = {key: torch.zeros(1).expand(shape) for key, shape in keys.items()}
    published = read_published(write(tmp_path / "file.pth", state))
    assert published.form == "dense"
    assert published.classes() == 1000
    assert model_name(published) == name


def settings_of_others() -> dict[str, Any]:
    """Return what training scripts store beside the weights: argparse's and yacs's settings."""
    module = ModuleType("yacs.config")

    class CfgNode(dict):  # type: ignore[type-arg]
        pass

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    sys.modules["yacs"], sys.modules["yacs.config"] = ModuleType("yacs"), module
    config = CfgNode(MODEL=CfgNode(DEPTHS=[2, 2]))
    config.__dict__["__immutable__"] = True
    return {"args": argparse.Namespace(lr=5e-5, device="cuda"), "config": config}


def test_settings_beside_the_weights_do_not_get_in_the_way(tmp_path: Path) -> None:
    state = deit_state(DENSE)
    try:
        path = write(tmp_path / "file.pth", state, optimizer={"state": {}, "param_groups": []}, **settings_of_others())
    finally:
        for name in ("yacs", "yacs.config"):
            sys.modules.pop(name, None)
    assert read_published(path).state.keys() == state.keys()


def test_folded_swin_is_converted_with_a_warning(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    for family, warnings in (("deit", 0), ("swin", 1)):
        state = FAMILIES[family][0](FOLDED)
        rebuild(read_published(write(tmp_path / f"{family}.pth", state)), host_of(family))
        assert len(caplog.records) == warnings
    assert "swin.pth: the published script folds Swin with DeiT's alpha and centre" in caplog.text


def test_dense_swin_file_of_microsoft_is_a_checkpoint_to_start_from(tmp_path: Path) -> None:
    state = swin_state(DENSE, dtype=torch.float32)
    path = write(tmp_path / "swin.pth", state)
    arguments = {**SWIN, "num_classes": CLASSES}
    config = ModelConfig(model="swin_tiny_patch4_window7_224", model_args=arguments, checkpoint=str(path))
    opened = open_model(config)
    assert opened.trained
    x = images(opened.model)
    assert_close(logits(opened.model.eval(), x), swin_logits(state, x))


MICRO = {
    "deit": ["--model", "deit_tiny_patch16_224", "--model_args", json.dumps(DEIT)],
    "swin": ["--model", "swin_tiny_patch4_window7_224", "--model_args", json.dumps(SWIN)],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_convert_writes_a_model_that_loads(capsys, family: str, tmp_path: Path) -> None:
    make, naive = FAMILIES[family]
    widths = {"deit": DEIT_WIDTHS, "swin": SWIN_WIDTHS}[family]
    kept = every_third(widths)
    state = make(UNFOLDED, [int(sum(vector)) for vector in kept.values()], dtype=torch.float32)
    path, out = write(tmp_path / "file.pth", state), tmp_path / "out"
    code, text, problems = run(capsys, "convert", str(path), str(out), *MICRO[family])
    assert (code, problems) == (0, "")
    name = {"deit": "DeiT", "swin": "Swin"}[family]
    assert f"{path}: published fine-tuned SPViT checkpoint, unfolded, {name} layout; model {MICRO[family][1]}" in text
    assert "7 classes" in text
    assert "attention: 1 msa, 1 conv3, 1 conv1, 1 skip; skip adds: normalised_input" in text
    assert "FFN units: 24/72, 24/72" in text
    assert "does not list which FFN units it kept" in text
    assert f'load("{out}")' in text
    assert sorted(file.name for file in out.iterdir()) == ["model.json", "model.safetensors"]
    assert describe(out).preprocessing == Preprocessing()
    model = spvit.load(out)
    x = torch.randn(2, 3, *(2 * [{"deit": 64, "swin": 28}[family]]))
    assert_close(logits(model, x), naive(state, x))

    ffn = str(indicators(tmp_path / "ffn.pth", kept))
    code, text, _ = run(capsys, "convert", str(path), str(tmp_path / "b"), *MICRO[family], "--indicators", ffn)
    assert code == 0
    assert "does not list" not in text
    assert describe(tmp_path / "b").architecture.blocks[1].ffn.units[:2] == (1, 4)

    dense = str(write(tmp_path / "dense.pth", make(DENSE)))
    code, text, _ = run(capsys, "convert", dense, str(tmp_path / "c"), *MICRO[family], "--indicators", ffn)
    assert code == 0
    assert f"dense {name} checkpoint" in text
    assert "lists no attention layers, so all of them stay" in text
    assert describe(tmp_path / "c").architecture.widths() == (24, 24, *(len(v) // 3 for v in list(kept.values())[2:]))


def test_convert_of_an_indicator_file_writes_an_architecture(capsys, tmp_path: Path) -> None:
    kept = every_third(DEIT_WIDTHS)
    path = str(indicators(tmp_path / "ffn.pth", kept))
    for name, options in (("a", []), ("b", MICRO["deit"])):
        code, text, problems = run(capsys, "convert", path, str(tmp_path / name), *options)
        assert (code, problems) == (0, "")
        assert f"{path}: published FFN indicator file, DeiT layout" in text
        assert "all of them stay" in text
        assert [file.name for file in (tmp_path / name).iterdir()] == ["architecture.json"]
        found = spvit.Architecture.load(tmp_path / name / "architecture.json")
        assert found.kinds() == ("msa",) * 4
        assert found.blocks[2].ffn.units == tuple(range(2, MLP, 3))


def test_convert_tells_deit_tiny_by_its_shapes(capsys, tmp_path: Path) -> None:
    model = timm.create_model("deit_tiny_patch16_224", num_classes=5)
    path = write(tmp_path / "deit_tiny.pth", model.state_dict())
    known = architectures()["spvit_deit_tiny_patch16_224"]
    vectors = {
        f"blocks.{index}": [float(unit in block.ffn.units) for unit in range(block.ffn.width)]
        for index, block in enumerate(known.blocks)
    }
    ffn = indicators(tmp_path / "ffn.pth", vectors)
    code, text, _ = run(capsys, "convert", str(path), str(tmp_path / "out"), "--indicators", str(ffn))
    assert code == 0
    assert "dense DeiT checkpoint; model deit_tiny_patch16_224, 5 classes" in text
    assert "attention as in the published architecture of these widths, spvit_deit_tiny_patch16_224" in text
    assert describe(tmp_path / "out").architecture == known
    assert count_params(spvit.load(tmp_path / "out")) < count_params(model)


class Harmful:
    """Runs code when it is unpickled, unless only weights are read."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was run",))


def without(state: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(start)}


SEARCHED = {"blocks.1.attn.kernel_thresholds": torch.ones(3), "blocks.1.attn.bn_3x3.weight": torch.ones(8)}
KERNEL = "blocks.0.attn.bconv.0.weight"
UNFIT: tuple[tuple[tuple[str, ...], str | dict[str, Tensor], str], ...] = (
    (UNFOLDED, SEARCHED, "blocks.1.attn holds bn_1x1, bn_3x3, head_probs, kernel_thresholds, proj, v, expected one of"),
    (DENSE, "blocks.2.attn", "blocks.2.attn has no qkv, expected it in all blocks or none"),
    (FOLDED, {KERNEL: torch.ones(8, 24, 5, 5)}, f"{KERNEL} is [8, 24, 5, 5], expected a 3 x 3 or 1 x 1 convolution"),
    (FOLDED, "blocks.1.attn.bconv.0", "blocks.1.attn.bconv.0.weight is missing"),
    (FOLDED, "blocks.1.attn.bconv.3", "blocks.1.attn.bconv.3.weight is missing"),
    (FOLDED, "blocks.1.attn.bconv.1", "does not fit: blocks.1.attn.bn.weight is missing there, but [8]"),
    (UNFOLDED, {"blocks.0.attn.head_probs": torch.ones(4, 9)}, "attn.head_probs is [4, 9], expected [3, 9]"),
    (UNFOLDED, "blocks.3.attn.qk.bias", "blocks.3.attn.qk.bias is missing"),
    (UNFOLDED, {"blocks.1.attn.v.weight": torch.ones(24, 23)}, "attn.v.weight is [24, 23], expected [24, 24]"),
    (UNFOLDED, "blocks.2.mlp.fc1", "blocks.2.mlp.fc1.weight is missing"),
    (UNFOLDED, {"blocks.2.mlp.fc1.weight": torch.ones(73, 24)}, "mlp.fc1 has 73 units, but the model has 72 there"),
    (UNFOLDED, "blocks.3", "3 blocks, blocks.0 to blocks.2, but this VisionTransformer has 4, blocks.0 to blocks.3"),
    (DENSE, {"pos_embed": torch.ones(1, 26, 24)}, "pos_embed is [1, 26, 24] there, but [1, 17, 24] in the model"),
)
"""Kinds of a file, the beginning of keys that it lacks or tensors that are others in it, and what that leads to."""


@pytest.mark.parametrize(("kinds", "change", "message"), UNFIT, ids=[message for _, _, message in UNFIT])
def test_checkpoints_that_do_not_fit_are_refused(kinds: Any, change: Any, message: str, tmp_path: Path) -> None:
    state = deit_state(kinds)
    state = without(state, change) if isinstance(change, str) else state | change
    with pytest.raises(CheckpointError, match=rf"file\.pth.*{re.escape(message)}"):
        rebuild(read_published(write(tmp_path / "file.pth", state)), host_of("deit"))


def test_a_checkpoint_of_no_known_layout_is_refused(tmp_path: Path) -> None:
    state = {f"layer{key}": value for key, value in deit_state(DENSE).items()}
    expected = r"is of no known layout: expected DeiT's keys \(blocks\.0\.\.\.\) or Swin's .*, found layercls_token"
    with pytest.raises(CheckpointError, match=expected):
        read_published(write(tmp_path / "file.pth", state))


def test_swin_of_another_window_or_depth_is_refused(tmp_path: Path) -> None:
    state = swin_state(DENSE)
    published = read_published(write(tmp_path / "file.pth", state))
    with pytest.raises(CheckpointError, match=r"bias_table is \[169, 3\] there, but \[\d+, 3\] in the model"):
        rebuild(published, host_of("swin", window_size=14))
    with pytest.raises(CheckpointError, match=r"layers\.0\.blocks\.0 to layers\.1\.blocks\.1, but this .* has 6"):
        rebuild(published, host_of("swin", depths=(2, 4)))
    with pytest.raises(
        CheckpointError, match=r"it has 4 blocks, layers\.0\.blocks\.0 .* but this VisionTransformer has 4"
    ):
        rebuild(published, host_of("deit"))
    shallow = ModelConfig(
        model="swin_tiny_patch4_window7_224",
        model_args={**SWIN, "depths": (2, 1), "num_classes": CLASSES},
        checkpoint=published.path,
    )
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.relative.* there, but missing in the model"):
        open_model(shallow)
    with pytest.raises(CheckpointError, match=r"has width 24 and \[2, 2\] blocks, expected a Swin of a known size"):
        model_name(published)
    headless = read_published(write(tmp_path / "a.pth", without(state, "patch_embed")))
    with pytest.raises(CheckpointError, match=r"a\.pth: patch_embed\.proj\.weight is missing"):
        model_name(headless)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (
            {**every_third(DEIT_WIDTHS), "blocks.2": [0.0, 1.0]},
            r"a vector of 2 units for blocks\.2\.mlp\.fc1, but .* 72",
        ),
        ({"blocks.0": [1.0] * 72}, r"it has 1 blocks, blocks\.0 to blocks\.0, but this VisionTransformer has 4"),
        ({**every_third(DEIT_WIDTHS), "blocks.2": [0.5] * 72}, r"blocks\.2.* \[72\] is not a vector of zeros and ones"),
        ({**every_third(DEIT_WIDTHS), "blocks.2": [[1.0]] * 72}, r"blocks\.2.* \[72, 1\] is not a vector of zeros and"),
        (every_third(SWIN_WIDTHS), r"layers\.0\.blocks\.0 to layers\.1\.blocks\.1, but this VisionTransformer"),
        (
            {**every_third(DEIT_WIDTHS), "blocks.2": [1.0] * 72},
            r"keeps 72 units of blocks\.2\.mlp, but checkpoint .* 24",
        ),
    ],
)
def test_indicators_that_do_not_fit_are_refused(vectors: Any, message: str, tmp_path: Path) -> None:
    published = read_published(write(tmp_path / "file.pth", deit_state(UNFOLDED, (24,) * 4)))
    with pytest.raises(CheckpointError, match=rf"ffn\.pth.*{message}"):
        rebuild(published, host_of("deit"), read_published(indicators(tmp_path / "ffn.pth", vectors)))


def test_weights_and_indicators_are_not_taken_for_each_other(tmp_path: Path) -> None:
    published = read_published(write(tmp_path / "file.pth", deit_state(UNFOLDED)))
    ffn = read_published(indicators(tmp_path / "ffn.pth", every_third(DEIT_WIDTHS)))
    with pytest.raises(
        CheckpointError, match=r"ffn\.pth is a published FFN indicator file, .*name it with --indicators"
    ):
        rebuild(ffn, host_of("deit"))
    with pytest.raises(
        CheckpointError, match=r"file\.pth: expected keys such as .*, found a published fine-tuned SPViT"
    ):
        rebuild(published, host_of("deit"), published)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("nowhere.pth does not exist", "nowhere.pth OUT"),
        ("cut.pth is damaged or not a weights file", "CUT OUT"),
        ("text.pth is damaged or not a weights file", "TEXT OUT"),
        ("text.jpg: expected a .safetensors or .pth file", "PICTURE OUT"),
        ("holds no weights: expected a dictionary of tensors, found the keys epoch", "EMPTY OUT"),
        ("harmful.pth is damaged or not a weights file: it holds a ", "HARMFUL OUT"),
        ("width 24 and [4] blocks, expected a DeiT of a known size (tiny: 192 and [12], ", "DEIT OUT"),
        ("blocks.0 to blocks.3, but this VisionTransformer has 12, blocks.0", "DEIT OUT --model deit_tiny_patch16_224"),
        ("(model deit_tiny_patch16_224)", "DEIT OUT --model deit_tiny_patch16_224"),
        ("(model deit_tiny_patch16_224, determined by its shapes; --model names another)", "LARGE OUT"),
        ("is [1, 577, 192] there, but [1, 197, 192] in the model", "LARGE OUT"),
        ("is neither a timm model nor", "DEIT OUT --model deit_huge"),
        (
            "a vector of 72 units for blocks.0.mlp.fc1, but the model 768",
            "FFN OUT --model deit_tiny_patch16_224 DEPTH",
        ),
        ("is an FFN indicator file itself", "FFN OUT --indicators FFN"),
        ("need the timm model that they are for; name it with --model", "DEIT OUT DEPTH"),
        ("is in use; name a new or empty folder", "DEIT USED"),
        ("is in use; name a new or empty folder", "DEIT DEIT"),
        ("required: OUTPUT", "DEIT"),
    ],
)
def test_bad_input_of_convert_is_one_line_and_nothing_written(capsys, tmp_path: Path, words: str, line: str) -> None:
    state = deit_state(DENSE)
    names = {
        "OUT": tmp_path / "out", "USED": tmp_path, "CUT": tmp_path / "cut.pth", "TEXT": tmp_path / "text.pth",
        "PICTURE": tmp_path / "text.jpg", "EMPTY": tmp_path / "empty.pth", "LARGE": tmp_path / "large.pth",
        "DEIT": write(tmp_path / "deit.pth", state), "HARMFUL": write(tmp_path / "harmful.pth", Harmful()),
        "FFN": indicators(tmp_path / "ffn.pth", every_third(DEIT_WIDTHS)), "DEPTH": "--model_args.depth",
    }  # fmt: skip
    names["CUT"].write_bytes(names["DEIT"].read_bytes()[:5000])
    for name in ("TEXT", "PICTURE"):
        names[name].write_text("not a checkpoint")
    torch.save({"epoch": 3}, names["EMPTY"])
    if "LARGE" in line:
        with torch.device("meta"):
            large = timm.create_model("deit_tiny_patch16_224", img_size=384).state_dict()
        write(names["LARGE"], {key: torch.zeros(1).expand(value.shape) for key, value in large.items()})
    arguments = [str(names.get(word, word)) for word in line.split()]
    if "DEPTH" in line:
        arguments.append("4")
    refused(capsys, words, "convert", *arguments)
    assert not names["OUT"].exists()
    assert names["DEIT"].is_file()
