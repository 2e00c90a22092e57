"""Several processes of one run, on the CPU: what they train, report and continue."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import spvit
from spvit.cli.main import main
from training import GREY, MODEL, MODEL_ARGS, image_folder, micro_host, states_equal


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launched(*words: str) -> str:
    """Run a command of spvit in two processes and return what they print."""
    launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(), "-m", "spvit.cli"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_continued_run_of_two_processes_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    words = ["train", "--model", MODEL, "--model_args", json.dumps(MODEL_ARGS), "--pretrained", "false"]
    words += ["--data", "digits", "--images.mean", "[0.5]", "--images.std", "[0.5]", "--dense.warmup_epochs", "0"]
    words += ["--dense.learning_rate", "1e-3", "--dense.minimum_learning_rate", "1e-3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    text = launched(*words, "--dense.epochs", "2", "--output", str(whole))
    assert text.count("10 classes") == 1
    launched(*words, "--dense.epochs", "1", "--output", str(cut))
    launched("train", "--output", str(cut), "--resume", "--dense.epochs", "2")
    assert states_equal(spvit.load(whole), spvit.load(cut))


def test_one_process_scores_and_decides_for_all(tmp_path: Path) -> None:
    spvit.save(micro_host(), tmp_path / "host", preprocessing=GREY)
    words = ["compress", "--model", str(tmp_path / "host"), "--data", "digits", "--calibration_images", "128"]
    words += ["--macs", "60%", "--epochs", "1", "--finetune.warmup_epochs", "0"]
    launched(*words, "--output", str(tmp_path / "run"))
    assert main([*words, "--epochs", "0", "--output", str(tmp_path / "alone")]) == 0
    files = [(tmp_path / run / "architecture.json").read_text() for run in ("run", "alone")]
    assert files[0] == files[1]
    assert spvit.Scores.load(tmp_path / "run").weights == spvit.Scores.load(tmp_path / "alone").weights


def test_images_that_cannot_be_read_are_left_out_of_every_process_alike(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "pictures", count=5)
    (root / "val" / "cat" / "2.png").write_bytes(b"junk")
    words = ["train", "--model", "test_vit", "--pretrained", "false", "--model_args", '{"img_size": 32}']
    words += ["--data", str(root), "--images.batch_size", "4", "--images.skip_corrupt", "true", "--dense.epochs", "1"]
    launched(*words, "--output", str(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines if line["event"] == "evaluation"] == [9]


def test_the_others_end_with_the_message_of_the_first_that_fails(tmp_path: Path) -> None:
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
    assert "one calibration image is too few to fit and measure" in texts[0]
    assert "the first process failed: one calibration image is too few to fit and measure" in texts[1]
    assert 0 not in [process.returncode for process in started]
    assert not (tmp_path / "run").exists()
