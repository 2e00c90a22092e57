"""What is measured of models, how it is compared, and what bad input gets; no test looks at a time."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import timm
import torch

import spvit
from command import refused, run
from spvit.errors import ModelError, RunError
from spvit.speed.benchmark import BATCHES, ROUNDS, Program, measure_latencies
from training import MODEL, MODEL_ARGS, micro_host


class Paced(Program):
    """A program that takes given milliseconds, one after another, again and again; the first three warm up."""

    times = (1.0,)
    turns = -3

    def timed(self, images: torch.Tensor, runs: int) -> float:
        type(self).turns += 1
        return self.times[max(0, self.turns) % len(self.times)]


def paced(*times: float) -> Program:
    made = type("Made", (Paced,), {"times": times})
    return made("model", lambda images: None, (1, 8, 8))


@pytest.mark.parametrize(
    ("times", "noise"),
    [
        ((1.0,), True),
        ((0.995,), True),  # by less than 1 % nothing differs
        ((0.9,), False),
        ((1.2,), False),
        ((0.8, 1.3), True),  # faster in half of the rounds
    ],
)
def test_a_difference_is_noise_unless_nearly_all_rounds_agree(times: tuple[float, ...], noise: bool) -> None:
    first, other = measure_latencies([paced(1.0), paced(*times)], batch=4)
    assert (first.within_noise, first.speed_up) == (True, 1.0)
    assert (other.within_noise, other.batch, other.repeats) == (noise, 4, first.repeats)
    low, high = other.speed_up_range
    assert low <= other.speed_up <= high
    assert other.images_per_s == pytest.approx(4000 / other.latency_ms)


def test_slow_models_have_seven_rounds_and_the_median_lies_within_all_of_them() -> None:
    _, other = measure_latencies([paced(900.0), paced(100.0, 200.0, 300.0)], batch=1)
    assert other.repeats == ROUNDS == 7
    assert other.speed_up_range == (3.0, 9.0)


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a pruned model in it, and what it was exported to."""
    folder, images = tmp_path_factory.mktemp("models"), torch.randn(200, 1, 8, 8)
    host = micro_host()
    small = spvit.fold(spvit.prune(host, spvit.decide(host, macs="60%", calibration=images), repair=images))
    spvit.save(small, folder / "small")
    formats = ["pt2", *(["onnx"] if importlib.util.find_spec("onnxscript") else [])]
    for suffix in formats:
        spvit.export(small, folder / f"small.{suffix}")
    return folder


def test_modules_folders_and_exported_files_are_measured_together(folder: Path) -> None:
    host = micro_host().train().to(torch.float64)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".pt2", ".onnx"))
    found = spvit.benchmark(host, folder / "small", *files, batches=(1, 3), dtype="fp32", threads=1, seconds=0.0)
    assert host.training
    assert next(host.parameters()).dtype == torch.float64
    dense, small, *exported = found
    assert small.macs < dense.macs
    assert (dense.file_bytes, small.file_bytes) == (None, (folder / "small" / "model.safetensors").stat().st_size)
    assert [row.backend for row in exported] == [
        {".pt2": "torch", ".onnx": "onnxruntime"}[file.suffix] for file in files
    ]
    for row, file in zip(exported, files):
        assert (row.macs, row.params, row.dtype) == (small.macs, small.params, "float32")
        assert row.file_bytes == file.stat().st_size
    for row in found:
        assert [(latency.batch, latency.threads, latency.device) for latency in row.latency] == [
            (1, 1, "cpu"),
            (3, 1, "cpu"),
        ]
    assert BATCHES == (1, 64)


def test_the_command_prints_tables_and_writes_json(capsys, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    arguments = ["--model-args", json.dumps(MODEL_ARGS), "--batches", "1", "2", "--seconds", "0", "--threads", "1"]
    words = ["benchmark", MODEL, str(folder / "small"), MODEL, *arguments, "--dtype", "bf16", "--json", str(file)]
    code, text, problems = run(capsys, *words)
    assert (code, problems) == (0, "")
    for said in ("a pass of 2 images", "speed-up (95 %)", "torch, bfloat16", "1 thread;", "(3)"):
        assert said in text
    rows = [line.split("│") for line in text.splitlines()]
    for length, place in ((8, 1), (7, 2)):  # long names take several lines, so that models can be told apart
        assert str(folder / "small") in "".join(row[place].strip() for row in rows if len(row) == length)
    dense, small, _ = json.loads(file.read_text())
    assert (dense["model"], small["macs"] < dense["macs"]) == (MODEL, True)
    needed = {"device", "dtype", "batch", "threads", "backend", "repeats", "latency_ms", "spread_ms", "speed_up"}
    assert needed <= small["latency"][1].keys()
    refused(capsys, "exists already; name another file", *words)


def test_profile_measures_a_pruned_model_beside_the_dense_one(capsys, monkeypatch, folder: Path) -> None:
    monkeypatch.setattr("spvit.cli.commands.BATCHES", (1,))
    code, text, _ = run(capsys, "profile", str(folder / "small"), "--latency")
    assert code == 0
    assert "speed-up over dense" in text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("required: --models", ""),
        ("is neither a timm model nor a folder", "nothing_like_it"),
        ("does not exist; write it with: spvit export", "FOLDER/other.onnx"),
        ("is no model: expected a file that ends in .onnx, .pt2, .xml", "FOLDER/small/model.json"),
        ("cannot be opened by torch", "FOLDER/text.pt2"),
        ("expected one model or more, batches of 1 or more", "FOLDER/small --batches 0"),
        ("dtype fp8; expected", "FOLDER/small --dtype fp8"),
        ("threads is 0", "FOLDER/small --threads 0"),
        ("device 'moon' cannot be used", "FOLDER/small --device moon"),
        ("runs on the CPU here, not on 'cuda'", "FOLDER/small.pt2 --device cuda"),
        ("--batches", "FOLDER/small --batches few"),
    ],
)
def test_bad_input_is_one_line(capsys, folder: Path, words: str, line: str) -> None:
    (folder / "text.pt2").write_text("not a program")
    refused(capsys, words, "benchmark", *line.replace("FOLDER", str(folder)).split())


def test_what_is_not_installed_is_said_with_what_to_install(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "model.xml").touch()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ModelError, match=r"model.xml needs openvino, which is not installed: pip install openvino"):
        spvit.benchmark(tmp_path / "model.xml")


def test_a_model_that_fails_at_a_batch_size_is_named(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    fixed = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1, 3, 4, 4])
    output = onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, [1, 3, 4, 4])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["images"], ["output"])], "relu", [fixed], [output])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10),
        tmp_path / "m.onnx",
    )
    [found] = spvit.benchmark(tmp_path / "m.onnx", batches=(1,), seconds=0.0)
    assert (found.macs, found.params) == (None, None)
    with pytest.raises(RunError, match="m.onnx fails at batch 2"):
        spvit.benchmark(tmp_path / "m.onnx", batches=(2,), seconds=0.0)


def test_timm_models_are_not_downloaded_to_be_measured(monkeypatch) -> None:
    asked = []
    make = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *args, **own: asked.append(own["pretrained"]) or make(*args, **own)
    )
    spvit.benchmark(MODEL, batches=(1,), seconds=0.0, model_args=MODEL_ARGS)
    assert asked == [False]
