"""Several processes of one run, on the CPU: what they train, report and continue."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import spvit
import two_processes
from command import digits_recipe, refused
from spvit.cli.main import main
from spvit.errors import DataError, ModelError
from spvit.train.processes import make_accelerator, processes, use_device
from spvit.train.settings import LoopConfig
from spvit.train.shards import sharded
from training import GREY, MODEL, MODEL_ARGS, image_folder, micro_host
from two_processes import COUNTED, PLAIN, halved, taught

SCRIPT = Path(two_processes.__file__)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launch(*words: str, count: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script or module of Python in several processes."""
    launcher = ["torch.distributed.run", "--nproc_per_node", str(count), "--master_port", free_port()]
    return subprocess.run(
        [sys.executable, "-m", *launcher, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment},
    )


def launched(*words: str) -> str:
    """Run a script or module of Python in two processes and return what they print."""
    done = launch(*words)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_launcher_may_start_a_single_process_where_there_is_no_accelerator(tmp_path: Path) -> None:
    words = ["train", "--model", MODEL, "--model_args", json.dumps(MODEL_ARGS), "--pretrained", "false"]
    words += ["--data", "digits", "--epochs", "1", "--output", str(tmp_path / "run")]
    done = launch("-m", "spvit_command", *words, count=1, ACCELERATE_USE_CPU="false")
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of one launch of all that needs no command, and what each of the two processes found."""
    folder = tmp_path_factory.mktemp("both")
    root = image_folder(folder / "pictures", size=8, count=5)
    (root / "val" / "cat" / "2.png").write_bytes(b"junk")
    launched(str(SCRIPT), str(folder))
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_that_signals_stop_continue_to_the_same_bytes(both: Any) -> None:
    folder, found = both
    assert [own["continued"] for own in found] == [True, True]
    lines = [(folder / run / "metrics.jsonl").read_text().splitlines() for run in ("whole", "cut")]
    whole, cut = ([{**json.loads(line), "images_per_s": 0, "data_wait": 0} for line in own] for own in lines)
    assert cut == whole


def test_each_process_draws_its_own_gates(both: Any) -> None:
    first, second = (own["draws"] for own in both[1])
    assert not set(first) & set(second)


def test_each_image_is_counted_once(both: Any) -> None:
    assert [own["halved"]["images"] for own in both[1]] == [COUNTED, COUNTED]
    assert [own["read"] for own in both[1]] == [9, 9]  # of ten, one of which cannot be read


def test_two_processes_of_half_the_batch_are_one_of_the_whole(both: Any, tmp_path: Path) -> None:
    """Also when each takes that half in two batches, whose gradients add up before they are exchanged."""
    folder, found = both
    one = halved(tmp_path, 128)
    for name, file in (("halved", "halved1"), ("quartered", "halved2")):
        assert found[0][name] == found[1][name] == pytest.approx(one, rel=1e-6)
        alone, two = load_file(tmp_path / "halved1.safetensors"), load_file(folder / f"{file}.safetensors")
        for key, value in alone.items():  # but for keys' biases, which have no gradient but rounding
            assert torch.allclose(two[key], value, rtol=1e-5, atol=5e-6 if key.endswith("qkv.bias") else 5e-8), key


def assert_alike(two: dict[str, torch.Tensor], one: dict[str, torch.Tensor]) -> None:
    assert {key: (value.shape, value.dtype) for key, value in two.items()} == {
        key: (value.shape, value.dtype) for key, value in one.items()
    }
    for key, value in one.items():  # keys' biases and their moments have no gradient but rounding
        assert torch.allclose(two[key], value, rtol=1e-4, atol=2e-5 if "bias" in key else 1e-6), key


def test_two_processes_with_shards_are_one_with_the_whole(both: Any, tmp_path: Path) -> None:
    """Average, best weights, layers' rates, clipping and a frozen layer among it; parts sharded and not in turns."""
    folder, found = both
    for own in found:
        assert own["shards"][0]
        assert all(0.45 < share < 0.55 for share in own["shards"][0])
    one = taught(tmp_path / "one", (False,), batch_size=128, **PLAIN)
    for name in ("summed", "turns"):
        assert_alike(load_file(folder / f"{name}.safetensors"), one)
        for file in ("best", "epoch-0002"):
            place = f"state/dense/{file}.safetensors"
            assert_alike(load_file(folder / name / place), load_file(tmp_path / "one" / place))
    features = taught(tmp_path / "features", (False,), labels=False, batch_size=128, **PLAIN)
    assert_alike(load_file(folder / "features.safetensors"), features)
    assert_alike(taught(folder / "left", (False,), batch_size=128, **PLAIN), one)  # which two with shards began


def test_one_process_does_not_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--recipe", digits_recipe(tmp_path)(), "--output", str(tmp_path / "run"), "--shard"]
    assert main([*words, "--dense.epochs", "0"]) == 0
    assert "shard: one process holds the whole model; start several for parts" in capsys.readouterr().out


def test_what_is_not_sharded_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["search", "--recipe", digits_recipe(tmp_path)(), "--output", str(tmp_path / "run"), "--shard"]
    refused(capsys, "a search is not sharded, as its budget reads the gates of all blocks at once; leave out", *words)

    def fails(*_: object, **__: object) -> None:
        raise ValueError("it has scalar parameters")

    monkeypatch.setattr("spvit.train.shards.init_device_mesh", lambda *_: None)
    monkeypatch.setattr("spvit.train.shards.fully_shard", fails)
    with pytest.raises(DataError, match=r"this model cannot be sharded: it has scalar parameters; leave out --shard"):
        sharded(model := micro_host(), model)
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.7.1"))
    with pytest.raises(DataError, match=r"shard needs torch 2.8 or newer, found 2.7.1; leave it out"):
        LoopConfig(shard=True)


def test_a_stopped_run_with_shards_continues_to_the_same_bytes(both: Any) -> None:
    folder, found = both
    assert [own["shards"][1] for own in found] == [True, True]
    for file in ("best", "epoch-0002"):
        paths = [folder / run / "state" / "dense" / f"{file}.safetensors" for run in ("whole_shards", "cut_shards")]
        assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.slow
def test_a_process_that_fails_ends_the_run_with_one_message_and_a_state(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", "--model", MODEL, "--model_args", json.dumps(MODEL_ARGS), "--pretrained", "false"]
    words += ["--data", "digits", "--images.mean", "[0.5]", "--images.std", "[0.5]", "--save_minutes", "1e-9"]
    words += ["--log_every", "1"]  # at which several processes look up
    for how, more, message in (
        ("raises", words, "spvit: one of two fails"),
        ("killed", ["train", "--resume"], "spvit: another process of the run has ended, or cannot be reached; a run"),
    ):
        done = launch(str(SCRIPT), how, *more, "--output", str(run))
        assert done.returncode == 1
        [line] = [line for line in done.stdout.splitlines() if "spvit: " in line]
        assert line.startswith(message)
        assert "[rank" not in done.stdout  # no traceback
    assert (run / "state" / "dense" / "epoch-0000-000004.safetensors").is_file()


@pytest.mark.slow
def test_one_process_scores_and_decides_for_all(tmp_path: Path) -> None:
    spvit.save(micro_host(), tmp_path / "host", preprocessing=GREY)
    words = ["compress", "--model", str(tmp_path / "host"), "--data", "digits", "--calibration_images", "128"]
    words += ["--macs", "60%", "--epochs", "1", "--finetune.warmup_epochs", "0"]
    launched("-m", "spvit.cli", *words, "--output", str(tmp_path / "run"))
    assert main([*words, "--epochs", "0", "--output", str(tmp_path / "alone")]) == 0
    files = [(tmp_path / run / "architecture.json").read_text() for run in ("run", "alone")]
    assert files[0] == files[1]
    assert spvit.Scores.load(tmp_path / "run").weights == spvit.Scores.load(tmp_path / "alone").weights


@pytest.mark.slow
def test_two_processes_find_a_rate_and_distil_without_labels(tmp_path: Path) -> None:
    spvit.save(micro_host(num_classes=0), tmp_path / "host", preprocessing=GREY)
    words = ["compress", "--model", str(tmp_path / "host"), "--data", "digits", "--calibration_images", "128"]
    words += ["--macs", "50%", "--epochs", "1", "--images.batch_size", "16", "--output", str(tmp_path / "run")]
    printed = launched("-m", "spvit.cli", *words)
    assert "finetune: learning rate" in printed
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if line["event"] == "learning_rate"]) == 1
    assert all("hidden_loss" in line for line in lines if line["event"] == "step")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["pruned"]["agreement"] > summary["after_pruning"]["agreement"]
    assert not (tmp_path / "run" / ".trials").exists()


@pytest.mark.slow
def test_all_end_with_one_message_when_the_first_fails(tmp_path: Path) -> None:
    """Without a launcher that would end them: each process is on its own."""
    spvit.save(micro_host(), tmp_path / "host", preprocessing=GREY)
    words = ["compress", "--model", str(tmp_path / "host"), "--data", "digits", "--calibration_images", "1"]
    own = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "spvit.cli", *words, "--output", str(tmp_path / "run")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **own, "RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"},
        )
        for rank in ("0", "1")
    ]
    texts = [process.communicate(timeout=120)[0] for process in started]
    assert "".join(texts).count("one calibration image is too few to fit and measure") == 1
    assert 0 not in [process.returncode for process in started]
    assert not (tmp_path / "run").exists()


def test_a_run_has_the_device_that_is_named_and_the_next_one_chooses_anew() -> None:
    use_device("cpu")
    with pytest.raises(ModelError, match=r"device 'moon' cannot be used; there is cpu"):
        use_device("moon")
    own = make_accelerator()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("spvit.train.processes.device_named", torch.device)
        use_device("meta")
        assert make_accelerator().device == processes().device == torch.device("meta")
    use_device(None)
    assert make_accelerator().device == own.device


def test_several_processes_do_not_share_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    state = SimpleNamespace(num_processes=2, device=torch.device("cuda", 0))
    monkeypatch.setattr("spvit.train.processes.processes", lambda cpu: state)
    monkeypatch.setattr("spvit.train.processes.device_named", torch.device)
    use_device("cuda")
    for name in ("cuda:1", "mps"):
        with pytest.raises(DataError, match=f"device is {name}, but each of the 2 processes takes its own cuda"):
            use_device(name)


def test_what_a_launcher_asks_for_and_would_not_get_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(DataError, match=r"asks to add up 4 gradients; give --images.accumulate 4 instead"):
        use_device(None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(
        DataError, match=r"asks for FSDP, which spvit cannot train with; launch without it, and give --shard for"
    ):
        use_device(None)
