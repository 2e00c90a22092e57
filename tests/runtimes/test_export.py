"""What is exported runs elsewhere and answers alike: every family, every format, any batch; and what bad input gets."""

from __future__ import annotations

import importlib.util
import json
import resource
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spvit
from spvit.architecture import FFN, Architecture, Attention, Block
from spvit.errors import CalibrationError, ExportError, RunError
from spvit.runtimes import quantize
from spvit.runtimes.quantize import CALIBRATION, SMOOTHING, Fusion
from spvit.runtimes.writers import METADATA, WRITERS

pytest.importorskip("transformers")
from command import refused, run
from library_models import LIBRARY, LIBRARY_EXPECTED
from tiny import HOSTS, MIXED, assert_close, input_size, logits, make_host, randomise

onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    **{name: HOSTS[name] for name in ("class_token", "dynamic", "swin_padded", "huggingface")},
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


def sizes_of(file: Path) -> tuple[list[str | int], list[str | int]]:
    """Return the sizes of a program's images and of its output: those that vary by their names."""
    graph = onnx.load(file).graph
    assert not [dim for value in graph.value_info for dim in value.type.tensor_type.shape.dim if "s3" in dim.dim_param]
    images, output = (
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (graph.input[0], graph.output[0])
    )
    return images, output


def in_8_bits(made: dict[str, Any], name: str) -> bool:
    return name in made and made[name].op_type == "DequantizeLinear"


def search_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make int8 in one way."""
    monkeypatch.setattr("spvit.runtimes.quantize.SMOOTHING", (None,))
    monkeypatch.setattr("spvit.runtimes.quantize.CALIBRATION", ("minmax",))


@pytest.fixture(name="small", scope="module")
def _small() -> nn.Module:
    return Case("class_token").model


@pytest.mark.parametrize(
    "name", [name if name in HOSTS else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
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
    """Pruned attention is fused like dense attention by what runs it; opset 18 has no such operation."""
    classes = [f"kind {index}" for index in range(7)]
    about = {"preprocessing": PREPROCESSING, "classes": classes, "with_preprocessing": True}
    done = spvit.export(small, tmp_path / "model.onnx", opset=opset, **about)
    apart = Fusion((0, 1), (0, 4), ("blocks.3.attn",))
    assert done.fusion == (apart if opset == 18 else Fusion((1, 1), (4, 4), ()))
    proto = onnx.load(done.path)
    onnx.checker.check_model(proto)
    assert str(Path.home()).encode() not in done.path.read_bytes()
    assert b".py" not in done.path.read_bytes()
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


def test_dense_models_of_other_precisions_are_exported_in_single(tmp_path: Path) -> None:
    host = make_host("class_token", torch.bfloat16)
    done = spvit.export(host, tmp_path / "model.onnx")
    x = torch.randn(1, *input_size(host))
    assert_close(answers(done.path, x), logits(host.float(), x))


@pytest.fixture(name="sizes", scope="module")
def _sizes() -> nn.Module:
    return Case("dynamic").model


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_height_and_width_vary_where_the_model_takes_other_sizes(sizes: nn.Module, tmp_path: Path, form: str) -> None:
    done = spvit.export(sizes, tmp_path / f"model.{form}", dynamic_size=True)
    run = torch.export.load(done.path).module() if form == "pt2" else partial(answers, done.path)
    for size in ((96, 160), (64, 64)):
        x = torch.rand(3, 3, *size)
        assert_close(run(x).detach(), logits(sizes, x))
    if form == "onnx":
        assert sizes_of(done.path) == (["batch", 3, "height", "width"], ["batch", 7])


def test_half_precision_keeps_its_input_and_output(small: nn.Module, tmp_path: Path) -> None:
    done = spvit.export(small, tmp_path / "model.onnx", precision="fp16", most_drop=0.2)
    assert done.single is not None
    assert done.bytes < 0.8 * done.single.bytes  # the graph is most of so small a model
    assert 0 < done.difference < 0.02
    assert done.fusion == Fusion((0, 1), (0, 4), ("blocks.3.attn",))  # as in single precision
    x = torch.randn(3, *input_size(small))
    assert (answers(done.path, x) - logits(small, x)).abs().max() < 0.02 * logits(small, x).abs().max()


@pytest.fixture(name="narrow", scope="module")
def _narrow() -> tuple[nn.Module, Tensor, Tensor]:
    """A pruned model with a channel that dwarfs the others after a norm, training images, and others."""
    case = Case("class_token")
    model: Any = case.model
    with torch.no_grad():
        model.blocks[1].norm2.weight[3] *= 30
        model.blocks[1].mlp.fc1.weight[:, 3] /= 30
    return model, case.images(40, seed=2), case.images(24, seed=3)


def test_int8_is_searched_on_some_images_and_compared_on_others(
    narrow: tuple[nn.Module, Tensor, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, training, images = narrow
    labels, steps = logits(model, images).argmax(1), []
    about = {"images": images, "labels": labels, "calibration": training, "most_drop": 0.2}
    report = lambda *step: steps.append(step)  # noqa: E731
    done = spvit.export(model, tmp_path / "model.onnx", precision="int8", report=report, **about)
    assert "int8 takes its ranges from 30 images; 500 or more give steadier ranges" in caplog.text
    assert steps == [(step + 1, 20) for step in range(20)]  # two passes of four batches, and twelve ways
    way, single = done.quantised, done.single
    assert way is not None
    assert single is not None
    assert set(way.agreement) == {(a, b) for a in SMOOTHING for b in CALIBRATION}
    assert way.agreement[way.smoothing, way.calibration] == max(way.agreement.values())
    assert way.agreement[0.5, "minmax"] > way.agreement[None, "minmax"]
    assert single.accuracy == 1
    assert done.accuracy == done.agreement > 0.8
    proto = onnx.load(done.path)
    said = {item.key: item.value for item in proto.metadata_props}
    assert said.keys() == {METADATA}
    assert json.loads(said[METADATA])["precision"] == "int8"
    assert sizes_of(done.path) == (["batch", *input_size(model)], ["batch", 7])
    made = {name: node for node in proto.graph.node for name in node.output}
    read = {node.op_type for node in proto.graph.node for name in node.input if in_8_bits(made, name)}
    after_convolutions = {"Reshape", "Transpose", "Add", "Relu", "Concat", "Shape"}
    assert read <= {"MatMul", "Gemm", "Conv"} | after_convolutions
    assert sum(node.op_type in ("MatMul", "Gemm") and in_8_bits(made, node.input[1]) for node in proto.graph.node) >= 9
    assert len(answers(done.path, images[:5])) == 5


def test_a_drop_above_the_limit_fails_with_figures_and_keeps_the_old_file(
    narrow: tuple[nn.Module, Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search_briefly(monkeypatch)
    model, training, images = narrow
    file = tmp_path / "model.onnx"
    file.write_text("old")
    about = {"images": images, "calibration": training, "most_drop": -1.0, "overwrite": True}
    with pytest.raises(RunError, match=r"int8 loses too much, .*: agreement .* MB against .*model.differs"):
        spvit.export(model, file, precision="int8", **about)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.differs.onnx", "model.onnx"]
    assert file.read_text() == "old"


def test_calibration_images_that_cannot_serve_are_refused(small: nn.Module, tmp_path: Path) -> None:
    some = torch.randn(3, *input_size(small))
    with pytest.raises(CalibrationError, match="int8 got 3 calibration images, expected 4"):
        spvit.export(small, tmp_path / "model.onnx", precision="int8", images=some, calibration=some)
    assert not list(tmp_path.iterdir())


def test_smoothing_changes_nothing_but_the_rounding(small: nn.Module, tmp_path: Path) -> None:
    spvit.export(small, tmp_path / "model.onnx")
    program, x = onnx.load(tmp_path / "model.onnx"), torch.randn(8, *input_size(small))
    read = quantize._read(program)
    limits = quantize._limits(quantize._values(program, x, read, lambda: None), read)
    scales = quantize._scales(program, limits, 0.5)
    assert len(scales) >= 5  # four norms before FFNs and the one before attention
    smoothed = quantize._smoothed(program, scales)
    assert_close(quantize.answers(quantize.session(smoothed), x), logits(small, x))
    after = quantize._limits(quantize._values(smoothed, x, read, lambda: None), read)
    for name, scale in scales.items():
        assert_close(after[name][1], limits[name][1] / scale)
    with pytest.raises(CalibrationError, match="not finite"):
        quantize.quantised(program, x * torch.nan, x)


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
def test_openvino_runs_what_is_exported(small: nn.Module, tmp_path: Path) -> None:
    import openvino

    done = spvit.export(small, tmp_path / "model.xml", preprocessing=PREPROCESSING)
    compiled = openvino.compile_model(done.path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    x = torch.randn(3, *input_size(small))
    assert_close(torch.from_numpy(compiled({"images": x.numpy()})["output"]), logits(small, x))


@pytest.mark.skipif(importlib.util.find_spec("executorch") is None, reason="executorch is not installed")
def test_executorch_runs_what_is_exported(small: nn.Module, tmp_path: Path) -> None:
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    done = spvit.export(small, tmp_path / "model.pt2")
    lowered = to_edge_transform_and_lower(torch.export.load(done.path)).to_executorch()
    x = torch.randn(2, *input_size(small))
    method = Runtime.get().load_program(lowered.buffer).load_method("forward")
    assert_close(method.execute([x])[0], logits(small, x))


@pytest.mark.skipif(importlib.util.find_spec("coremltools") is None, reason="coremltools is not installed")
def test_coreml_takes_what_is_exported(small: nn.Module, tmp_path: Path) -> None:
    import coremltools

    done = spvit.export(small, tmp_path / "model.pt2")
    program = torch.export.load(done.path).run_decompositions({})
    assert coremltools.convert(program, minimum_deployment_target=coremltools.target.iOS17).get_spec().mlProgram


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "format": ("model.tflite", {}, r"format is '.tflite', expected onnx, pt2, openvino, safetensors"),
    "suffix": ("model.bin", {"to": "onnx"}, r"model.bin is to hold onnx, which ends in .onnx; name it so"),
    "opset": ("model.onnx", {"opset": 12}, "opset is 12, expected 18 to 23"),
    "images": ("model.pt2", {"images": torch.zeros(2, 3, 5, 5)}, r"images are \[2, 3, 5, 5\], expected \[images, 3, "),
    "precision": ("model.onnx", {"precision": "int4"}, "precision is 'int4', expected fp32, fp16 or int8"),
    "int8 elsewhere": ("model.pt2", {"precision": "int8"}, "int8 is for onnx, not for pt2; export to onnx"),
    "no calibration": ("model.onnx", {"precision": "int8"}, r"int8 needs training images .* --data"),
    "labels": ("model.pt2", {"labels": torch.zeros(3)}, r"labels are \[3\], expected one for each image, \[8\]"),
    "one size": ("model.onnx", {"dynamic_size": True}, r"takes images of 64 x 64 alone .*dynamic_img_size=True"),
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


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2", "model.safetensors"])
def test_a_full_disk_is_no_fault_of_the_model(small: nn.Module, tmp_path: Path, name: str) -> None:
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(RunError, match=rf"{tmp_path}/{name} could not be written \(.*File too large.*; what was"):
            spvit.export(small, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not any(tmp_path.iterdir())


def test_an_operation_that_onnx_does_not_know_is_named(tmp_path: Path) -> None:
    host: Any = make_host("class_token", torch.float32)
    host.head.register_forward_hook(lambda module, args, output: output * torch.linalg.svdvals(output).sum())
    with pytest.raises(ExportError, match="VisionTransformer cannot be exported to onnx: .*svd.*; in head$"):
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
    code, out, _ = run(capsys, "export", str(tmp_path / "run"), "--to", "safetensors")
    assert code == 0
    assert "run/model.export.safetensors: safetensors, " in out  # beside the model's own
    refused(capsys, "expected onnx, pt2, openvino, safetensors", "export", str(tmp_path / "run"), "--to", "coreml")


def test_the_command_sets_int8_beside_the_dense_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    from spvit.speed.benchmark import benchmark
    from training import MODEL, MODEL_ARGS, micro_host

    search_briefly(monkeypatch)
    monkeypatch.setattr("spvit.cli.export.benchmark", partial(benchmark, seconds=0.0))
    host, folder = micro_host(), tmp_path / "run"
    architecture = Architecture(
        tuple(Block(Attention("msa"), FFN.whole(b.ffn.units)) for b in spvit.recognise(host).blocks)
    )
    spvit.save(
        spvit.prune(host, architecture),
        folder,
        preprocessing=spvit.Preprocessing((0.5,), (0.5,), crop=1.0),
        classes=list("0123456789"),
    )
    words = ("export", str(folder), "--int8", "--data", "digits", "--most-drop", "0.5")
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert "run does not say what it was made from; name it with --dense" in out
    assert "pruned fp32" in out
    assert "pruned int8" in out
    assert "accuracy" in out
    assert (folder / "model.int8.onnx").is_file()
    torch.save(host.state_dict(), tmp_path / "dense.pth")
    settings = {
        "model": MODEL,
        "model_args": MODEL_ARGS,
        "pretrained": False,
        "checkpoint": str(tmp_path / "dense.pth"),
    }
    (folder / "config.yaml").write_text(json.dumps(settings))
    code, out, _ = run(capsys, "export", str(folder), "--fp16", "--data", "digits", "--most-drop", "0.5")
    assert code == 0
    assert "dense fp32" in out
    refused(capsys, "give --int8 or --fp16", "export", str(folder), "--int8", "--fp16")
    refused(capsys, "--data", "export", str(folder), "--int8", "--output", str(tmp_path / "other.onnx"))
    (folder / "model.safetensors").unlink()
    refused(capsys, "model.safetensors does not exist", "export", str(folder))
