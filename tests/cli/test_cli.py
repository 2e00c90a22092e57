"""The command: every sub-command runs on the digits, and bad input gets one line and exit code 2."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import spvit
import spvit_command
from command import DIGITS, SHORT, digits_recipe, measure_briefly, refused, run, time_by_macs, trained_weights
from spvit.architecture import dense
from spvit.cli.main import COMMANDS, main, parse
from spvit.models import ModelConfig, open_model
from spvit.train.compress import timed
from spvit.train.processes import processes
from spvit.train.run_folder import RunFolder
from spvit.train.settings import CompressConfig
from training import MODEL, MODEL_ARGS, digits, image_folder, micro_host, run_in, states_equal


@pytest.fixture
def recipe(tmp_path: Path):
    return digits_recipe(tmp_path)


@pytest.fixture
def trained(tmp_path: Path) -> str:
    return trained_weights(tmp_path)


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_briefly(monkeypatch)


def test_compress_then_evaluate_profile_and_load(capsys, recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = recipe(dense=SHORT, search=SHORT, finetune=SHORT, log_every=4)
    code, text, problems = run(capsys, "compress", "--recipe", settings, "--output", str(out), "--macs", "60%")
    assert (code, problems) == (0, "")
    expected = ("dense epoch 1/1", "search epoch 1/1", "finetune epoch 1/1", "speed-up (95 %)", f'load("{out}")')
    for words in (*expected, f"page about this run: {out}/report.html"):
        assert words in text
    assert {path.name for path in out.iterdir()} == {
        "architecture.json", "config.yaml", "dense", "latency.json", "metrics.jsonl", "model.json", "model.safetensors",
        "report.html", "state", "summary.json",
    }  # fmt: skip
    assert spvit.load(out)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    accuracy = json.loads((out / "summary.json").read_text())["pruned"]["accuracy"]
    code, text, _ = run(capsys, "evaluate", "--model", str(out), "--data", "digits")
    assert code == 0
    assert f"accuracy {accuracy:.2%}" in text
    code, text, _ = run(capsys, "profile", "--model", str(out))
    assert code == 0
    assert "share" in text
    refused(capsys, "is in use", "compress", "--recipe", settings, "--output", str(out))


def test_train_search_and_finetune_chain(capsys, recipe, tmp_path: Path) -> None:
    dense, searched, tuned = (str(tmp_path / name) for name in ("dense", "searched", "tuned"))
    assert run(capsys, "train", "--recipe", recipe(dense=SHORT), "--output", dense)[0] == 0
    common = ["--model", dense, "--data", "digits", "--images.batch_size", "128"]
    assert run(capsys, "search", *common, "--output", searched, "--params", "70%", "--search.epochs", "1")[0] == 0
    assert (
        run(capsys, "finetune", "--model", searched, *common[2:], "--output", tuned, "--finetune.epochs", "1")[0] == 0
    )
    assert spvit.surgery.pruned_record(spvit.load(searched)).folded is False
    assert spvit.surgery.pruned_record(spvit.load(tuned)).folded is True
    again = [*common, "--architecture", f"{searched}/architecture.json", "--finetune.epochs", "1"]
    again += ["--finetune.distillation", "0.5", "--output", str(tmp_path / "from_dense")]
    assert run(capsys, "finetune", *again)[0] == 0
    both = spvit.surgery.pruned_record(spvit.load(tmp_path / "from_dense"))
    assert both == spvit.surgery.pruned_record(spvit.load(tuned))


def _phases(folder: Path) -> set[str]:
    return {json.loads(line)["phase"] for line in (folder / "metrics.jsonl").read_text().splitlines()}


def test_compress_without_a_search_decides_repairs_and_continues(capsys, recipe, trained, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = recipe(checkpoint=trained, finetune={"warmup_epochs": 0.0, "keep_best": False}, calibration_images=300)
    words = ["compress", "--recipe", settings, "--output", str(out), "--macs", "70%", "--epochs", "1"]
    code, text, problems = run(capsys, *words)
    assert (code, problems) == (0, "")
    assert "finetune epoch 1/1" in text
    assert "after pruning and repair: accuracy" in text
    assert {path.name for path in out.iterdir()} == {
        "architecture.json", "config.yaml", "latency.json", "metrics.jsonl", "model.json", "model.safetensors",
        "report.html", "scores.json", "scores.safetensors", "state", "summary.json",
    }  # fmt: skip
    assert _phases(out) == {"finetune"}
    before = (out / "architecture.json").read_text()
    architecture = spvit.Architecture.from_json(before)
    assert (architecture.prefix_rule, architecture.skip_rule) == ("linear", "mean")
    model = spvit.load(out)
    record = spvit.surgery.pruned_record(model)
    assert record.folded
    assert record.architecture == architecture
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() == {"dense", "after_pruning", "pruned", "macs", "params"}

    for name in ("model.safetensors", "model.json", "summary.json"):  # as a kill at the end would leave it
        (out / name).unlink()
    assert run(capsys, "compress", "--output", str(out), "--resume")[0] == 0
    assert states_equal(spvit.load(out), model)
    assert json.loads((out / "summary.json").read_text()) == summary
    assert run(capsys, "compress", "--output", str(out), "--resume", "--epochs", "2")[0] == 0
    epochs = [json.loads(line)["epoch"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(epochs) == 2
    assert (out / "architecture.json").read_text() == before
    assert not states_equal(spvit.load(out), model)
    others = (("calibration-images", "299", "300"), ("repair-views", "2", "4"), ("repair", "false", "True"))
    for option, value, found in others:
        asked = [f"--{option}", value]
        refused(capsys, f"holds a run with --{option} {found}", "compress", "--output", str(out), "--resume", *asked)
    searching = ["--output", str(out), "--resume", "--search.epochs", "1"]
    refused(capsys, "scores, without a search, not by a search", "compress", *searching)


@pytest.mark.slow
def test_compress_leaves_alone_what_it_is_told_to(capsys, recipe, trained, tmp_path: Path) -> None:
    settings = recipe(checkpoint=trained, calibration_images=300, macs="75%", forbid=["skip", "conv3:1"])
    words = ["compress", "--recipe", settings, "--keep", "-2", "*.0.attn", "--smallest-width=25%", "--no-train"]
    words += ["--output", str(tmp_path / "run")]
    code, text, problems = run(capsys, *words, "--dry-run")
    assert (code, problems) == (0, "")
    assert "constraints: keep -2, *.0.attn; forbid skip, conv3:1; smallest_width 25%" in text
    assert "repair: 1,200 views of training images, whose tokens take 3.917MB of memory" in text
    assert run(capsys, *words)[0] == 0
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (kept["keep"], kept["forbid"], kept["smallest_width"]) == ([-2, "*.0.attn"], ["skip", "conv3:1"], "25%")
    first, second = spvit.Architecture.load(tmp_path / "run" / "architecture.json").blocks
    assert first == dense([96]).blocks[0]
    assert second.attention.kind in ("msa", "conv1")
    assert 24 <= len(second.ffn.units) < 96
    resume = ["compress", "--output", str(tmp_path / "run"), "--resume"]
    refused(capsys, "holds a run with --keep (-2, '*.0.attn'), not (1,)", *resume, "--keep", "1")
    assert run(capsys, *resume)[0] == 0


@pytest.mark.parametrize(
    "words", [["--no-train"], pytest.param(["--epochs", "0", "--repair", "false"], marks=pytest.mark.slow)]
)
def test_compress_without_training_leaves_what_pruning_gave(capsys, recipe, trained, tmp_path: Path, words) -> None:
    out = tmp_path / "run"
    settings = recipe(checkpoint=trained, calibration_images=200)
    arguments = ["compress", "--recipe", settings, "--output", str(out), "--params", "80%"]
    code, text, problems = run(capsys, *arguments, *words)
    assert (code, problems) == (0, "")
    assert "epoch" not in text
    repaired = words == ["--no-train"]
    assert ("after pruning and repair: accuracy" in text) == repaired
    assert {path.name for path in out.iterdir()} == {
        "architecture.json", "config.yaml", "latency.json", "model.json", "model.safetensors", "report.html",
        "scores.json", "scores.safetensors", "state", "summary.json",
    }  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert summary["pruned"] == summary["after_pruning"]
    assert summary["pruned"]["loss"] != summary["dense"]["loss"]
    model, host = spvit.load(out), micro_host()
    architecture = spvit.surgery.pruned_record(model).architecture
    plain = spvit.fold(spvit.prune(host, architecture))
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), plain.eval()(x)) != repaired
    if not repaired:  # what is drawn at pruning is drawn alike
        assert run(capsys, "compress", "--output", str(out), "--resume")[0] == 0
        assert states_equal(spvit.load(out), model)


def test_scores_of_a_run_decide_another_budget(capsys, recipe, trained, tmp_path: Path, monkeypatch) -> None:
    words = ["compress", "--recipe", recipe(checkpoint=trained, calibration_images=200), "--no-train"]
    assert run(capsys, *words, "--output", str(tmp_path / "a"), "--macs", "80%")[0] == 0
    monkeypatch.setattr("spvit.train.compress.score", None)  # nothing is scored again
    again = ["--scores", str(tmp_path / "a"), "--output", str(tmp_path / "b"), "--macs", "60%"]
    code, text, problems = run(capsys, *words, *again)
    assert (code, problems) == (0, "")
    assert "share" in text
    kept = [spvit.Architecture.load(tmp_path / name / "architecture.json") for name in "ab"]
    costs = [spvit.cost(micro_host(), architecture)["macs"] for architecture in kept]
    assert costs[1] / costs[0] == pytest.approx(60 / 80, rel=0.01)
    refused(capsys, "holds no scores", *words, "--output", str(tmp_path / "c"), "--scores", str(tmp_path / "none"))
    again = ["--scores", str(tmp_path / "a"), "--output", str(tmp_path / "c"), "--objective", "tokens"]
    refused(capsys, "the scores are by objective logits, not tokens", *words, *again)
    refused(capsys, "objective is 'patch', expected auto or", *words, *again[:-1], "patch")


@pytest.mark.slow
def test_a_latency_budget_keeps_its_table_for_what_follows(
    capsys, recipe, trained, tmp_path: Path, monkeypatch
) -> None:
    time_by_macs(monkeypatch)
    words = ["compress", "--recipe", recipe(checkpoint=trained, calibration_images=200), "--no-train"]
    first = [*words, "--output", str(tmp_path / "a"), "--latency", "70%"]
    code, text, problems = run(capsys, *first)
    assert (code, problems) == (0, "")
    assert "of the dense network's" in text
    path = tmp_path / "a" / "latency_table.json"
    table = path.read_text()
    found = [spvit.Architecture.load(tmp_path / "a" / "architecture.json")]
    assert "budget 70%" in (tmp_path / "a" / "report.html").read_text()
    (tmp_path / "a" / "architecture.json").unlink()
    monkeypatch.setattr("spvit.train.compress.measure", None)  # the table is not measured again
    assert run(capsys, *first, "--resume")[0] == 0
    assert path.read_text() == table
    again = [*words, "--scores", str(tmp_path / "a"), "--latency", "60%"]
    assert run(capsys, *again, "--output", str(tmp_path / "b"))[0] == 0
    found += [spvit.Architecture.load(tmp_path / name / "architecture.json") for name in "ab"]
    macs = [spvit.cost(micro_host(), own)["macs"] / spvit.cost(micro_host())["macs"] for own in found]
    assert found[0] == found[1]
    assert [share**0.8 for share in macs] == pytest.approx([0.7, 0.7, 0.6], rel=0.03)
    other = CompressConfig(scores=str(tmp_path / "a"), latency_batch=8)  # whose table is not of that
    monkeypatch.setattr("spvit.train.compress.measure", lambda *_, **__: spvit.LatencyTable.load(path))
    timed(spvit.Host.of(micro_host()), other, run_in(tmp_path, digits()))
    assert (tmp_path / "latency_table.json").is_file()
    (tmp_path / "a" / "architecture.json").unlink()
    path.write_text(table.replace('"batch": 1', '"batch": 2'))
    refused(capsys, "the latency table is of batch 2, but here it is 1", *first, "--resume")
    words = [*first[:-3], str(tmp_path / "d"), "--latency"]
    refused(capsys, "a larger batch (spvit.measure(host, batch=8), --latency-batch 8) often", *words, "1%")
    assert not (tmp_path / "d").exists()
    assert run(capsys, *words, "60%", "--dry-run")[0] == 0
    assert not (tmp_path / "d").exists()


@pytest.mark.slow
def test_hugging_face_model_is_compressed_and_loaded(capsys, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=16, patch_size=4,
        num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)  # of other weights the repair may say that it wants more images
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "hf")
    capsys.readouterr()  # what transformers says when it saves
    images, out = image_folder(tmp_path / "pictures"), tmp_path / "run"
    settings = ["--images.batch_size", "4", "--search.epochs", "1", "--finetune.epochs", "1", "--precision", "bf16"]
    words = ["compress", "--model", f"hf:{tmp_path / 'hf'}", "--data", str(images), "--output", str(out), *settings]
    code, text, problems = run(capsys, *words, "--macs", "80%")
    assert (code, problems) == (0, "")
    assert "pruned" in text
    assert type(spvit.load(out)).__name__ == "ViTForImageClassification"
    assert run(capsys, "evaluate", "--model", str(out), "--data", str(images))[0] == 0


@pytest.mark.slow
def test_killed_run_continues_to_the_same_model(capsys, recipe, tmp_path: Path) -> None:
    search = {"epochs": 2, "warmup_epochs": 0.0}
    settings = recipe(dense=SHORT, search=search, finetune=SHORT, log_every=1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(capsys, "compress", "--output", str(whole), "--recipe", settings)[0] == 0
    command = [sys.executable, "-m", "spvit.cli", "compress", "--output", str(killed), "--recipe", settings]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)
    metrics = killed / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"search", "event": "step"' in metrics.read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "model.safetensors").exists()
    assert run(capsys, "compress", "--output", str(killed), "--resume")[0] == 0
    assert states_equal(spvit.load(whole), spvit.load(killed))


def test_resume_takes_new_settings_but_not_another_run(capsys, recipe, tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    assert run(capsys, "train", "--recipe", recipe(dense=SHORT), "--output", out)[0] == 0
    assert run(capsys, "train", "--output", out, "--resume", "--dense.epochs", "2")[0] == 0
    refused(capsys, "holds a run with --seed 0, not 1", "train", "--output", out, "--resume", "--seed", "1")
    for option, value, had in (
        ("held-out", 50, 0),
        ("mean", [0.1], (0.5,)),
        ("crop", 0.5, 1.0),
        ("background", 0, 1.0),
    ):
        words = ("train", "--output", out, "--resume", f"--images.{option}={value}")
        refused(capsys, f"holds a run with --images.{option} {had}, not", *words)
    path = tmp_path / "run" / "config.yaml"  # which may be edited, as on the command line
    before = path.read_text()
    path.write_text(before.replace("seed: 0", "seed: 1"))
    refused(capsys, "holds a run with --seed 0, not 1", "train", "--output", out, "--resume")
    path.write_text(before.replace("epochs: 2", "epochs: 3"))
    assert run(capsys, "train", "--output", out, "--resume")[0] == 0
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(epochs) == 3
    refused(capsys, "holds a run of 'spvit train'", "search", "--output", out, "--resume", "true")
    refused(capsys, "holds no run to continue", "train", "--output", str(tmp_path / "none"), "--resume")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    refused(capsys, "holds no config.yaml", "train", "--output", str(tmp_path / "other"), "--resume")


def test_resume_by_a_recipe_that_names_the_folder_is_checked_too(capsys, recipe, tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    settings = recipe(dense=SHORT, seed=1, output=out)
    assert run(capsys, "train", "--recipe", settings, "--seed", "2")[0] == 0
    before = (tmp_path / "run" / "config.yaml").read_text()
    for words in (["--resume"], ["--resume", "yes"]):
        refused(capsys, "holds a run with --seed 2, not 1", "train", "--recipe", settings, *words)
    refused(capsys, "holds a run with --seed 2, not 3", "train", "--output", out, "--seed", "3", "--resume", "yes")
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    assert run(capsys, "train", "--recipe", settings, "--seed", "2", "--resume")[0] == 0


def test_damaged_settings_of_a_run_are_named_with_what_is_whole(capsys, recipe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    RunFolder(folder).write_settings("train", Path(recipe(output=str(folder))).read_text())
    settings, kept = folder / "config.yaml", folder / "state" / "config.yaml"
    whole = settings.read_bytes()
    resume = ["train", "--output", str(folder), "--resume"]
    for damaged, other in ((settings, kept), (kept, settings)):
        for content, why in (
            (whole[:14], "it holds no settings"),
            (b"", "it holds"),
            (whole + b"{", "while"),
            (b"\xff", "'utf-8'"),
        ):
            damaged.write_bytes(content)
            refused(capsys, f"{damaged} is damaged ({why}", *resume)
            refused(capsys, f"; copy {other}, which is whole, to it", *resume)
        damaged.write_bytes(whole)
    settings.write_bytes(b"")
    kept.write_bytes(b"")
    refused(capsys, f"{settings} is damaged (it holds no settings); start the run anew in another folder", *resume)


def test_weights_that_are_not_finite_have_no_accuracy(capsys, recipe, tmp_path: Path) -> None:
    model = micro_host()
    model.blocks[0].mlp.fc1.weight.data[0, 0] = float("nan")
    torch.save(model.state_dict(), tmp_path / "nan.pth")
    code, _, problems = run(capsys, "evaluate", "--recipe", recipe(checkpoint=str(tmp_path / "nan.pth")))
    assert code == 1
    assert "outputs are not finite, nor are weights of blocks.0.mlp.fc1.weight" in problems


def started(*words: str) -> subprocess.Popen[str]:
    code = "import sys, spvit_command; sys.exit(spvit_command.main())"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *words], env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)


def test_sigterm_ends_a_run_with_a_state_and_ctrl_c_takes_one_line(recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["train", "--recipe", recipe(dense={**SHORT, "epochs": 200}, log_every=1), "--output", str(out)]
    for number, code, message in (
        (signal.SIGTERM, 143, "spvit: stopped by SIGTERM after"),
        (signal.SIGINT, 130, "spvit: interrupted"),
    ):
        (out / "metrics.jsonl").unlink(missing_ok=True)
        process = started(*words)
        while process.poll() is None and not (out / "metrics.jsonl").exists():
            time.sleep(0.05)
        process.send_signal(number)
        _, problems = process.communicate(timeout=60)
        assert (process.returncode, len(problems.splitlines())) == (code, 1), problems
        assert problems.startswith(message)
        words = ["train", "--output", str(out), "--resume"]
    assert any((out / "state" / "dense").glob("epoch-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_within_imports_takes_one_line(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "torch.py").write_text(f"import os, time\nos.kill(os.getpid(), {number:d})\ntime.sleep(9)")
    paths = os.pathsep.join([str(tmp_path), str(Path(spvit_command.__file__).parent)])
    command = [sys.executable, "-m", "spvit_command", "profile", MODEL]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + number, "spvit: interrupted\n")


def test_a_signal_does_not_cut_short_what_is_said_at_the_end(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(error: RuntimeError) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return f"a process has ended: {error}"

    def fails(*_: object) -> None:
        raise RuntimeError("gloo")

    monkeypatch.setattr("spvit.cli.main.who_is_gone", gone)
    monkeypatch.setitem(COMMANDS, "profile", (COMMANDS["profile"][0], fails))
    code, _, problems = run(capsys, "profile", MODEL)
    said = "spvit: a process has ended: gloo; a run that has saved a state continues with --resume\n"
    assert (code, problems) == (1, said)


def test_what_needs_no_model_is_answered_without_torch(tmp_path: Path) -> None:
    code = "import sys, spvit_command as c\ncode = c.main()\nassert 'torch' not in sys.modules; sys.exit(code)"
    for words, expected, text in (
        ("--help", 0, "compress   Compress a model to a budget."),
        ("--version", 0, f"spvit {spvit.__version__}"),
        ("compres", 2, "spvit: 'compres' is no command; did you mean compress?"),
        ("", 2, "spvit: a command is missing; expected one of"),
    ):
        done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True)
        assert done.returncode == expected, done.stderr
        assert text in done.stdout + done.stderr
    assert spvit_command._commands().keys() == COMMANDS.keys()


@pytest.mark.parametrize("words", ["--help", "profile vit_tiny_patch16_224"])
def test_output_that_nobody_reads_ends_a_command_without_a_word(words: str) -> None:
    process = started(*words.split())
    process.stdout.close()
    assert (process.wait(timeout=60), process.stderr.read()) == (128 + signal.SIGPIPE, "")


@pytest.mark.slow
def test_a_phase_that_others_followed_is_not_changed(capsys, recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    search = {"epochs": 1, "warmup_epochs": 0.0}
    arguments = ["compress", "--recipe", recipe(dense=SHORT, search=search, finetune=SHORT), "--output", str(out)]
    assert run(capsys, *arguments)[0] == 0
    kept = {name: (out / name).read_bytes() for name in ("config.yaml", "architecture.json", "model.safetensors")}
    for phase, words in (("dense", ["--dense.epochs", "2"]), ("search", ["--search.budget_weight", "400"])):
        refused(capsys, f"gone on from its {phase} phase", "compress", "--output", str(out), "--resume", *words)
    assert {name: (out / name).read_bytes() for name in kept} == kept


def test_what_a_run_has_produced_outlives_a_bad_image(capsys, tmp_path: Path) -> None:
    root, out = image_folder(tmp_path / "pictures", size=40), tmp_path / "run"
    cut = root / "val" / "cat" / "2.png"
    cut.write_bytes(cut.read_bytes()[:60])  # behind its header; met after the first epoch
    arguments = ["train", "--model", "test_vit", "--pretrained", "false", "--model_args", '{"img_size": 32}']
    arguments += ["--data", str(root), "--images.batch_size", "4", "--dense.epochs", "1", "--output", str(out)]
    refused(capsys, "2.png cannot be read", *arguments)
    assert (out / "metrics.jsonl").is_file()
    more = ["--images.skip_corrupt", "true", "--images.most_unreadable", "0.5"]
    assert run(capsys, "train", "--output", str(out), "--resume", *more)[0] == 0


def test_classes_are_compared_with_those_that_the_model_was_trained_for(capsys, tmp_path: Path) -> None:
    root, out = image_folder(tmp_path / "pictures"), str(tmp_path / "run")
    arguments = ["--model", "test_vit", "--pretrained", "false", "--model_args", '{"img_size": 32}']
    arguments += ["--data", str(root), "--images.batch_size", "4", "--dense.epochs", "1"]
    assert run(capsys, "train", *arguments, "--output", out)[0] == 0
    other = image_folder(tmp_path / "others", classes=("car", "dog"))
    code, _, problems = run(capsys, "evaluate", "--model", out, "--data", str(other))
    assert code == 0
    assert "is 'cat', of" in " ".join(problems.split())
    assert run(capsys, "evaluate", "--model", out, "--data", str(root))[::2] == (0, "")
    description = tmp_path / "run" / "model.json"
    text = description.read_text()
    assert '"cat"' in text
    description.write_text(text.replace('"cat"', '"x"').replace('"dog"', '"cat"').replace('"x"', '"dog"'))
    refused(capsys, "in another order", "evaluate", "--model", out, "--data", str(root))


def test_a_saved_state_is_spoken_of_only_where_there_is_one(capsys, recipe, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "run"
    words = ["train", "--recipe", recipe(dense=SHORT), "--output", str(out)]
    assert run(capsys, *words)[0] == 0

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device", "a.json")

    for name in ("train", "profile"):
        monkeypatch.setitem(COMMANDS, name, (COMMANDS[name][0], fails))
    said = "spvit: a.json: No space left on device"
    kept = f"{said}; the last saved state is as it was\n"
    assert run(capsys, *words, "--resume")[::2] == (1, kept)
    assert run(capsys, "profile", MODEL)[::2] == (1, f"{said}\n")
    assert run(capsys, *words[:-1], str(tmp_path / "new"))[::2] == (1, f"{said}\n")


def test_diverging_run_exits_with_1_and_keeps_its_folder(capsys, recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = recipe(dense={**SHORT, "learning_rate": 10.0, "weight_decay": 1e30, "clip_gradient": 0.0})
    code, _, problems = run(capsys, "train", "--recipe", settings, "--output", str(out))
    assert code == 1
    assert "of dense (epoch 1): learning rate 10;" in problems
    assert (out / "metrics.jsonl").exists() or (out / "config.yaml").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("required: --model", "train --data digits --output OUT"),
        ("unrecognized arguments: --colour", "profile --model deit_tiny_patch16_224 --colour 1"),
        ("--dense.epochs is x, expected a whole number", "train --recipe RECIPE --output OUT --dense.epochs x"),
        ("unrecognized arguments: --search.speed", "compress --recipe RECIPE --output OUT --search.speed 1"),
        ("--search.epoch 1; did you mean --search.epochs?", "search --recipe RECIPE --output OUT --search.epoch 1"),
        ("--images.batch-sice", "search --recipe RECIPE --output OUT --images.batch-sice 1"),
        ("--images.mean is x, expected a list such as [0.5", "search --recipe RECIPE --output OUT --images.mean x"),
        ("expected true or false, found 'x'", "compress --recipe RECIPE --output OUT --repair x"),
        ("did you mean deit_tiny_patch16_224", "profile --model deit_tiny_patch16_242"),
        ("no trained weights for these 10 classes", "compress --recipe RECIPE --output OUT"),
        ("macs budget 'half' is malformed", "search --recipe TRAINED --output OUT --macs half"),
        ("DOUBLED, line 3: model is set on line 1", "train --recipe DOUBLED --output OUT"),
        ("BROKEN, line 3: no YAML", "train --recipe BROKEN --output OUT"),
        ("UNKNOWN, line 3: Group 'dense' does not accept option 'speed'", "train --recipe UNKNOWN --output OUT"),
        ("WRONG, line 2: --dense.epochs is few, expected a whole number", "train --recipe WRONG --output OUT"),
        (
            "FLIP, line 2: images.flip is 3.0, expected 0 or more",
            "compress --recipe TRAINED --recipe FLIP --output OUT",
        ),
        ("spvit: images.flip is 4.0, expected", "compress --recipe TRAINED --recipe FLIP --output OUT --images.flip 4"),
        ("SHARE, line 1: macs budget 50 is 50 macs", "search --recipe TRAINED --recipe SHARE --output OUT"),
        ("spvit: macs budget 60 is 60 macs", "search --recipe TRAINED --recipe SHARE --output OUT --macs 60"),
        ("BUDGETS, line 1: a budget is one of", "compress --recipe TRAINED --recipe BUDGETS --output OUT"),
        ("BUDGETS, line 2: a budget is one of", "compress --recipe TRAINED --recipe BUDGETS --output OUT --macs 50%"),
        ("EMPTY is empty, expected names with values", "train --recipe EMPTY --output OUT"),
        ("LIST is a list, expected names with values", "train --recipe LIST --output OUT"),
        ("NONE, line 1: no_train is for the command line; write epochs: 0", "compress --recipe NONE --output OUT"),
        (
            "RISE, line 2: finetune.warmup_epochs is -1.0, expected",
            "compress --recipe TRAINED --recipe RISE --output OUT",
        ),
        (
            "finetune: the teacher is a, but",
            "compress --recipe TRAINED --output OUT --finetune.teacher a --finetune.distillation 0",
        ),
        ("spvit: dense.epochs is -2, expected", "train --recipe FEWER --output OUT --epochs -2"),
        ("contradict each other", "compress --recipe TRAINED --output OUT --no-train --epochs 1"),
        ("contradict each other", "compress --recipe TRAINED --output OUT --epochs=1 --finetune.epochs 2"),
        ('write "50%"', "compress --recipe TRAINED --output OUT --macs 50"),
        ("macs budget '-50%' is malformed", "compress --recipe TRAINED --output OUT --macs -50%"),
        ('write "50%"', "frontier --recipe TRAINED --output OUT --budgets 50"),
        ("binds decisions by scores", "compress --recipe TRAINED --output OUT --latency 50% --search.epochs 1"),
        ("is not a folder that exists", "train --recipe RECIPE --output OUT --data nowhere"),
        ("precision is 'fp8'", "train --recipe RECIPE --output OUT --precision fp8"),
        ("calibration_images is 0, expected", "compress --recipe TRAINED --output OUT --calibration-images 0"),
        ("calibration tokens are too few", "compress --recipe TRAINED --output OUT --no-train --calibration-images 4"),
        ("multiples of 1: the smallest reachable", "compress --recipe TRAINED --output OUT --no-train --macs 1%"),
        ("keep 2: this VisionTransformer has blocks 0 to 1", "compress --recipe TRAINED --output OUT --keep 0 2"),
        ("loosen keep: without it", "compress --recipe TRAINED --output OUT --keep 0 -1 --forbid skip"),
        ("keep 0: these bind decisions by", "compress --recipe TRAINED --output OUT --keep 0 --search.epochs 1"),
        ("unrecognized arguments: --keep", "search --recipe TRAINED --output OUT --keep 0"),
        ("auto_augment 'rand-x9' is not", "train --recipe RECIPE --output OUT --images.auto_augment rand-x9"),
        ("auto_augment 'foo' is not one of timm's", "train --recipe RECIPE --output OUT --images.auto_augment foo"),
        ("name a teacher with --dense.teacher", "train --recipe RECIPE --output OUT --dense.distillation 0.5"),
        (
            "but there is no teacher; name a teacher with --dense.teacher",
            "compress --recipe RECIPE --output OUT --dense.epochs 1 --dense.distillation 1",
        ),
        ("model_args do not fit vit_tiny", "train --recipe RECIPE --output OUT --model_args.num_heads 5"),
        ("is a dense model", "finetune --recipe TRAINED --output OUT"),
        ("architecture file nowhere.json", "finetune --recipe TRAINED --output OUT --architecture nowhere.json"),
        (
            "deep.json: the architecture has 3 blocks, but this VisionTransformer has 2",
            "finetune --recipe TRAINED --output OUT --architecture DEEP",
        ),
        ("is neither a file nor a published one", "profile --model vit_tiny_patch16_224 --architecture best"),
        ("does not exist", "train --recipe RECIPE --output OUT --checkpoint nowhere.pth"),
        ("no trained weights", "evaluate --model vit_tiny_patch16_224 --pretrained false --data digits"),
    ],
)
def test_bad_input_is_one_line_and_nothing_written(capsys, recipe, trained, tmp_path: Path, words, line) -> None:
    out = tmp_path / "out"
    deep = tmp_path / "deep.json"
    deep.write_text(spvit.architecture.dense([96] * 3).to_json())
    unknown = tmp_path / "unknown.yaml"
    unknown.write_text(yaml.safe_dump({**DIGITS, "dense": {"speed": 1}}))
    weights = tmp_path / "with_weights.yaml"
    weights.write_text(yaml.safe_dump({**DIGITS, "checkpoint": trained}))
    names = {"OUT": out, "DEEP": deep, "UNKNOWN": unknown, "TRAINED": weights, "RECIPE": recipe()}
    for name, text in (
        ("DOUBLED", "model: a\ndata: digits\nmodel: b\n"),
        ("BROKEN", "model: a\ndata: {\n"),
        ("WRONG", "dense:\n  epochs: few\n"),
        ("RISE", "finetune:\n  warmup_epochs: -1\n"),
        ("FEWER", "model: a\ndata: digits\ndense:\n  epochs: -1\n"),
        ("FLIP", "images:\n  flip: 3\n"),
        ("SHARE", "macs: 50\n"),
        ("BUDGETS", "macs: 50%\nparams: 50%\n"),
        ("EMPTY", "# nothing yet\n"),
        ("LIST", "- model: a\n"),
        ("NONE", "no-train: true\n"),
    ):
        names[name] = tmp_path / name
        names[name].write_text(text)
    word = words.partition(" ")[0].rstrip(",")
    words = words.replace(word, str(names.get(word, word)), 1)
    refused(capsys, words, *(str(names.get(word, word)) for word in shlex.split(line)))
    assert not out.exists()


def help_of(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([*words])
    assert exit_.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_short_and_says_how_to_list_the_rest(capsys, name: str) -> None:
    text = help_of(capsys, name, "--help")
    assert f"usage: spvit {name}" in text
    assert text.count(" --") <= 26
    assert "--recipe" in text or name == "demo"
    assert "--data DATA" not in text or "--help-all" in text


def test_help_of_compress_has_groups_units_and_defaults(capsys) -> None:
    text = help_of(capsys, "compress", "--help")
    for words in (
        "model and data: --model", "budget, one of these: --macs", "what to do: --scores", "run: --recipe",
        "Budget in MACs of one image", "Images a step on each device (default: 64)", "--epochs", "--no-train",
        "--dry-run", "--help-all List every option",
    ):  # fmt: skip
        assert words in text
    assert "--search.budget-weight" not in text
    text = help_of(capsys, "compress", "--help-all")
    assert "--search.budget-weight BUDGET_WEIGHT" in text
    assert "--images.flip FLIP Probability of mirroring a training image left to right (default: 0.5)" in text


def test_help_of_export_has_formats_and_precisions_and_usage_the_model_as_readme_writes_it(capsys) -> None:
    text = help_of(capsys, "export", "--help")
    assert "usage: spvit export MODEL [options]" in text
    for option in ("to TO", "int8", "fp16", "most-drop", "opset", "with-preprocessing", "dynamic-size", "overwrite"):
        assert f" --{option} " in text
    for usage in (
        "benchmark MODELS [",
        "frontier MODEL --data DATA --output OUTPUT [",
        "evaluate --model MODEL --data",
    ):
        assert f"usage: spvit {usage}" in help_of(capsys, usage.split()[0], "--help")


@pytest.mark.parametrize(("command", "phase"), [("train", "dense"), ("search", "search"), ("finetune", "finetune")])
def test_a_command_of_one_phase_takes_its_length_by_the_same_names_as_compress(command: str, phase: str) -> None:
    for prefix in ("", f"{phase}."):
        words = [command, "--model", "m", "--data", "d", "--output", "o", f"--{prefix}epochs", "3"]
        settings = getattr(parse([*words, f"--{prefix}minutes=1.5"])[1], phase)
        assert (settings.epochs, settings.minutes) == (3, 1.5)


def test_options_have_dashes_or_underscores_and_flags_take_yes_and_no() -> None:
    needed = ["--model", "m", "--data", "d", "--output", "o"]

    def options(line: str) -> Any:
        return parse(["compress", *needed, *line.split()])[1]

    for line in (
        "--epochs 3 --search.budget-weight 3 --model-args.depth 3 --dry-run --no-repair --keep -1 0 *.mlp",
        "--epochs=3 --search.budget_weight=3 --model_args.depth 3 --dry_run true --repair=no --keep=-1 0 *.mlp",
        '--epochs 3 --search.budget-weight 3 --model-args.depth 3 --dry-run --repair false --keep [-1, 0, "*.mlp"]',
    ):
        found = options(f"{line} --forbid skip --smallest_width 64 --only ffn")
        assert (found.epochs, found.search.budget_weight, found.model_args) == (3, 3, {"depth": 3})
        assert (found.dry_run, found.repair, found.smallest_width) == (True, False, 64)
        assert (found.keep, found.forbid, found.only) == ((-1, 0, "*.mlp"), ("skip",), ("ffn",))
    found = options("--dry_run true --no-dry-run --no-train --keep -1,0,*.mlp")
    assert (found.dry_run, found.epochs, found.keep) == (False, 0, (-1, 0, "*.mlp"))
    found = options("--dry-run false --no_train")
    assert (found.dry_run, found.epochs, found.repair) == (False, 0, True)
    for words in (["NAME"], ["--model", "NAME"], ["NAME", "--latency"], ["--latency", "true", "NAME"]):
        _, options_ = parse(["profile", *words])
        assert (options_.model, options_.latency) == ("NAME", "--latency" in words)


def test_of_several_recipes_later_ones_win(tmp_path: Path) -> None:
    for name, text in (
        ("a", "{model: m, data: d, search: {epochs: 1, gate_logit: 3}}"),
        ("b", "{search: {epochs: 2}}"),
    ):
        (tmp_path / name).write_text(text)
    words = ["--recipe", str(tmp_path / "a"), "--recipe", str(tmp_path / "b"), "--output", "o"]
    _, options = parse(["compress", *words])
    assert (options.model, options.search.epochs, options.search.gate_logit) == ("m", 2, 3)


def test_profile_shows_a_published_architecture(capsys) -> None:
    name = "spvit_deit_tiny_patch16_224"
    code, text, _ = run(capsys, "profile", "--model", "deit_tiny_patch16_224", "--architecture", name)
    assert code == 0
    assert "4.775M" in text
    assert "1.039G" in text


def test_a_recipe_is_read_before_processes_meet_and_by_commands_that_write_nothing(
    capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, asked = tmp_path / "profile.yaml", []
    recipe.write_text(yaml.safe_dump({"model": MODEL, "model_args": MODEL_ARGS, "device": "cpu"}))
    monkeypatch.setattr("spvit.cli.main.processes", lambda cpu=False: asked.append(cpu) or processes(cpu))
    code, text, _ = run(capsys, "profile", "--recipe", str(recipe), "--model_args.depth", "1")
    assert code == 0
    assert text.count("96/96") == 1
    assert asked[0] is True


def test_seed_gives_the_same_untrained_model(capsys, recipe, tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in "ab"]
    for folder in folders:
        torch.rand(3)
        assert run(capsys, "train", "--recipe", recipe(dense=SHORT), "--output", folder)[0] == 0
    models = [open_model(ModelConfig(model=folder)).model for folder in folders]
    assert states_equal(*models)
