"""What is exported runs elsewhere and answers alike: every family, every format, any batch; and what bad input gets."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spvit
from spvit.architecture import FFN, Architecture, Attention, Block
from spvit.errors import ExportError
from spvit.export import METADATA, WRITERS

pytest.importorskip("transformers")
from command import refused, run
from library_models import LIBRARY, LIBRARY_EXPECTED
from tiny import HOSTS, MIXED, assert_close, input_size, logits, make_host, randomise

onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    **{name: HOSTS[name] for name in ("class_token", "swin_padded", "huggingface")},
    **LIBRARY,
}
PREPROCESSING = spvit.Preprocessing((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), crop=0.8)


class Case:
    """A family's pruned and repaired model, with every kind of attention."""

    def __init__(self, name: str) -> None:
        model = randomise(FAMILIES[name]()).eval()
        self.size = LIBRARY_EXPECTED[name].image if name in LIBRARY_EXPECTED else input_size(model)
        host = spvit.recognise(model, self.images(3))
        narrow = host.blocks[0].attention.narrows_values
        kept = (Attention(kind, value_rank=4 if kind == "msa" and narrow else None) for kind in MIXED)
        ffns = (FFN(block.ffn.units, tuple(range(0, block.ffn.units, 2))) for block in host.blocks)
        self.model = spvit.prune(host, Architecture(tuple(map(Block, kept, ffns))), repair=self.images(32, seed=1))

    def images(self, count: int, seed: int = 0) -> Tensor:
        return torch.randn(count, *self.size, generator=torch.Generator().manual_seed(seed))


def answers(file: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.fixture(name="small", scope="module")
def _small() -> nn.Module:
    return Case("class_token").model


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_runs_in_onnx_runtime_at_any_batch(name: str, tmp_path: Path) -> None:
    case = Case(name)
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    done = spvit.export(case.model, tmp_path / "model.onnx", images=case.images(7))
    assert (done.format, done.images, done.bytes) == ("onnx", 7, done.path.stat().st_size)
    assert done.difference < 1e-4
    assert done.agreement > 0.999
    for batch in (1, 4):
        x = case.images(batch, seed=batch)
        assert_close(answers(done.path, x), logits(case.model, x))
    assert all(torch.equal(case.model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("opset", [18, 23])
def test_what_images_need_travels_in_the_file_and_may_be_part_of_the_program(
    small: nn.Module, tmp_path: Path, opset: int
) -> None:
    classes = [f"kind {index}" for index in range(7)]
    about = {"preprocessing": PREPROCESSING, "classes": classes, "with_preprocessing": True}
    done = spvit.export(small, tmp_path / "model.onnx", opset=opset, **about)
    proto = onnx.load(done.path)
    onnx.checker.check_model(proto)
    assert {item.version for item in proto.opset_import if item.domain == ""} == {opset}
    said = json.loads({item.key: item.value for item in proto.metadata_props}[METADATA])
    assert said["classes"] == classes
    assert said["input_size"] == list(input_size(small))
    assert said["normalised_inside"] is True
    assert spvit.Preprocessing(**{**said["preprocessing"], "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}) == (
        PREPROCESSING
    )
    raw = torch.rand(3, *input_size(small))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (PREPROCESSING.mean, PREPROCESSING.std))
    assert_close(answers(done.path, raw), logits(small, (raw - mean) / std))


@pytest.mark.parametrize("form", ["pt2", "safetensors"])
def test_programs_and_weights_answer_alike(small: nn.Module, tmp_path: Path, form: str) -> None:
    file = tmp_path / f"model.{form}"
    one = torch.randn(1, *input_size(small))
    done = spvit.export(small, file, images=one, preprocessing=PREPROCESSING)
    assert (done.format, done.difference, done.agreement) == (form, 0, 1)
    x = torch.randn(3, *input_size(small))
    if form == "pt2":
        extra = {METADATA: ""}
        program = torch.export.load(file, extra_files=extra).module()
        assert json.loads(extra[METADATA])["preprocessing"]["crop"] == 0.8
        assert_close(logits(program, x), logits(small, x))
        return
    folded = spvit.fold(small)
    folded.load_state_dict(spvit.checkpoint.read_weights(file))
    assert_close(logits(folded, x), logits(small, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dense_models_of_other_precisions_are_exported_in_single(tmp_path: Path, dtype: torch.dtype) -> None:
    host = make_host("class_token", dtype)
    done = spvit.export(host, tmp_path / "model.onnx")
    x = torch.randn(1, *input_size(host))
    assert_close(answers(done.path, x), logits(host.float(), x))


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "format": ("model.tflite", {}, r"format is '.tflite', expected onnx, pt2, openvino, safetensors"),
    "suffix": ("model.bin", {"to": "onnx"}, r"model.bin is to hold onnx, which ends in .onnx; name it so"),
    "opset": ("model.onnx", {"opset": 12}, "opset is 12, expected 18 to 23"),
    "images": ("model.pt2", {"images": torch.zeros(2, 3, 5, 5)}, r"images are \[2, 3, 5, 5\], expected \[images, 3, "),
    "normalisation": ("model.onnx", {"with_preprocessing": True}, "needs preprocessing, .* pass preprocessing="),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_refused(small: nn.Module, tmp_path: Path, bad: str) -> None:
    name, options, message = BAD[bad]
    with pytest.raises(ExportError, match=message):
        spvit.export(small, tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_a_file_that_exists_stays(small: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    spvit.export(small, file)
    before = file.read_bytes()
    with pytest.raises(ExportError, match="model.safetensors exists already; .* overwrite=True"):
        spvit.export(small, file)
    assert file.read_bytes() == before
    assert spvit.export(small, file, overwrite=True).path == file


def test_a_missing_package_is_named(small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    with pytest.raises(ExportError, match=r"onnx needs onnxruntime; install with: pip install 'spvit\[export\]'"):
        spvit.export(small, tmp_path / "model.onnx")


def test_an_operation_that_onnx_does_not_know_is_named(tmp_path: Path) -> None:
    host: Any = make_host("class_token", torch.float32)
    host.head.register_forward_hook(lambda module, args, output: output * torch.linalg.svdvals(output).sum())
    with pytest.raises(ExportError, match="VisionTransformer cannot be exported to onnx: .*svd"):
        spvit.export(host, tmp_path / "model.onnx")


def test_what_answers_otherwise_is_kept_aside(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*arguments: Any) -> Callable[[Tensor], Tensor]:
        run = written(*arguments)
        return lambda images: run(images) * 1.01

    written = WRITERS["safetensors"]
    monkeypatch.setitem(WRITERS, "safetensors", write)
    with pytest.raises(ExportError, match=r"outputs differ by 0.01 .*; it is kept as .*model.differs.safetensors"):
        spvit.export(small, tmp_path / "model.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["model.differs.safetensors"]


def test_the_command_exports_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str], small: nn.Module) -> None:
    spvit.save(small, tmp_path / "run", preprocessing=PREPROCESSING)
    code, out, _ = run(capsys, "export", str(tmp_path / "run"), "--to", "pt2", "--with-preprocessing")
    assert code == 0
    assert "model.pt2: pt2, " in out
    assert "agreement 100.00%, on 8 images of noise (see --data)" in " ".join(out.split())
    refused(capsys, "exists already", "export", str(tmp_path / "run"), "--to", "pt2")
    refused(capsys, "expected onnx, pt2, openvino, safetensors", "export", str(tmp_path / "run"), "--to", "coreml")
