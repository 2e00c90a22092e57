"""What a kill, a signal or a damaged file leaves: the last states, one of which is whole, and the same weights."""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Subset

from spvit.checkpoint import replace_atomically, write_text
from spvit.errors import CheckpointError, RunError, RunFolderError, RunStoppedError
from spvit.hosts.walk import Part
from spvit.repair.scores import Scores
from spvit.search.budget_loss import BudgetLoss
from spvit.search.network import make_searchable
from spvit.train.lock import locked
from spvit.train.loop import Loop, Phase, run_phase
from spvit.train.run_folder import RunFolder
from spvit.train.settings import CompressConfig
from spvit.train.states import BlockStates, read_state, write_state
from training import compressed, digits, micro_host, run_in, short, short_search, states_equal


def phase_of(kind: str) -> Phase:
    settings: dict[str, Any] = {"averaging_epochs": 0.5, "keep_best": kind == "dense"}
    if kind == "search":
        net = make_searchable(micro_host())
        return Phase("search", net, short_search(2, **settings), BudgetLoss(net, macs="60%"))
    return Phase("dense", micro_host(drop_path_rate=0.2), short(2, **settings))


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in values.items() if name not in ("images_per_s", "data_wait")} for values in found
    ]


@pytest.mark.parametrize(
    ("kind", "repeats", "number", "workers"), [("dense", 3, "SIGTERM", 2), ("search", 0, "SIGUSR1", 0)]
)
def test_a_run_that_a_signal_stopped_within_an_epoch_ends_at_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, repeats: int, number: str, workers: int
) -> None:
    random = {"mixup": 0.2, "random_erasing": 0.2, "color_jitter": 0.2, "repeated_augmentation": repeats}
    images, whole, cut = digits(**random, workers=workers), phase_of(kind), phase_of(kind)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    figures = run_phase(whole, run_in(tmp_path / "whole", images, log_every=4))
    step = Loop.step

    def stopped(loop: Loop, batches: Any, index: int) -> dict[str, torch.Tensor]:
        if index in (3, 15):  # in the first epoch, and in the second
            os.kill(os.getpid(), getattr(signal, number))
        return step(loop, batches, index)

    monkeypatch.setattr(Loop, "step", stopped)
    handler = signal.getsignal(getattr(signal, number))
    for epochs, steps in ((0, 4), (1, 5)):
        with pytest.raises(RunStoppedError, match=f"by {number} after {epochs} epochs and {steps} steps of {kind}"):
            run_phase(cut, run_in(tmp_path / "cut", images, log_every=4))
        assert signal.getsignal(getattr(signal, number)) is handler
        assert (tmp_path / "cut" / "state" / kind / f"epoch-{epochs:04d}-{steps:06d}.safetensors").is_file()
        cut = phase_of(kind)
        torch.manual_seed(99)  # what happened before must not matter
    assert run_phase(cut, run_in(tmp_path / "cut", images, log_every=4)) == figures
    assert states_equal(whole.model, cut.model)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_states_are_saved_every_few_minutes_and_the_last_two_kept(tmp_path: Path) -> None:
    run_phase(phase_of("dense"), run_in(tmp_path, digits(), save_minutes=1e-9))
    names = {path.name for path in (tmp_path / "state" / "dense").iterdir()}
    assert names == {"best.safetensors", "epoch-0001-000011.safetensors", "epoch-0002.safetensors"}


def test_a_signal_while_images_are_evaluated_loses_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, sent = Loop._stop_or_save, []

    def signalled(loop: Loop) -> None:
        if loop.place == (0, 11) and len(sent) < 2:  # after the last step, and again as its epoch is evaluated
            sent.append(1)
            if len(sent) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        step(loop)

    monkeypatch.setattr(Loop, "_stop_or_save", signalled)
    with pytest.raises(RunStoppedError, match="after 0 epochs and 11 steps of dense"):
        run_phase(phase_of("dense"), run_in(tmp_path, digits()))
    run_phase(phase_of("dense"), run_in(tmp_path, digits()))
    assert [values["step"] for values in lines(tmp_path) if values["event"] == "step"] == [11, 20, 22]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "metadata"])
def test_a_damaged_state_is_named_and_the_one_before_it_used(tmp_path: Path, damage: str, caplog: Any) -> None:
    images, whole = digits(), phase_of("dense")
    figures = run_phase(whole, run_in(tmp_path, images))
    states = tmp_path / "state" / "dense"
    for path in (states / "epoch-0002.safetensors", states / "best.safetensors"):
        content = bytearray(path.read_bytes())
        if damage == "flipped":
            content[-5] ^= 1
        elif damage == "metadata":
            content = content.replace(b'epoch\\": ', b'epoch\\":1')
        path.write_bytes(content[: {"cut": len(content) // 2, "empty": 0}.get(damage, len(content))])
        with pytest.raises(CheckpointError, match="is damaged"):
            read_state(path)
    again = phase_of("dense")
    with caplog.at_level(logging.WARNING, logger="spvit"):
        continued = run_phase(again, run_in(tmp_path, images))
    assert "epoch-0002.safetensors is damaged" in caplog.text
    assert "the state before it is used" in caplog.text
    assert "best.safetensors is damaged" in caplog.text
    assert continued.images == figures.images
    read_state(states / "epoch-0002.safetensors")
    read_state(states / "best.safetensors")


def test_a_state_goes_on_with_as_many_images_as_it_had(tmp_path: Path) -> None:
    images = digits()
    run_phase(Phase("dense", micro_host(), short(1)), run_in(tmp_path, images))
    for name in ("train", "validation"):
        fewer = replace(images, **{name: Subset(getattr(images, name), range(200))})
        with pytest.raises(RunFolderError, match=r"a run on 1,437 training and 360 validation images, and .*200"):
            run_phase(Phase("dense", micro_host(), short(2)), run_in(tmp_path, fewer))
    run_phase(Phase("dense", micro_host(), short(2)), run_in(tmp_path, images))


def test_states_hold_tensors_of_any_kind(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 3, dtype=torch.bfloat16), "b": torch.tensor(3), "c": torch.zeros(0, 2)}
    write_state(tmp_path / "a.safetensors", tensors, {"epoch": 1})
    about, found = read_state(tmp_path / "a.safetensors")
    assert about["epoch"] == 1
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("phase", ["score", pytest.param("repair", marks=pytest.mark.slow)])
def test_a_run_killed_while_it_scores_or_repairs_goes_on_by_blocks(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    host, images = micro_host(depth=4), digits()
    config = CompressConfig(epochs=0, calibration_images=128, repair_views=1)
    whole = compressed(host, "60%", config, tmp_path / "whole", images)
    write, written = BlockStates.__setitem__, []

    def dies(states: BlockStates, block: int, part: Part) -> None:
        write(states, block, part)
        if states.folder.name == phase:
            written.append(block)
            if written == [0, 1, 2]:
                raise KeyboardInterrupt

    monkeypatch.setattr(BlockStates, "__setitem__", dies)
    with pytest.raises(KeyboardInterrupt):
        compressed(host, "60%", config, tmp_path / "cut", images)
    folder = tmp_path / "cut" / "state" / phase
    assert [path.name for path in sorted(folder.iterdir())] == [f"block-000{index}.safetensors" for index in range(3)]
    content = (folder / "block-0001.safetensors").read_bytes()
    (folder / "block-0001.safetensors").write_bytes(content[:-9])
    continued = compressed(host, "60%", config, tmp_path / "cut", images)
    assert written == [0, 1, 2, 1, 3]  # the damaged one is made again
    assert "block-0001.safetensors is damaged" in caplog.text
    assert states_equal(continued.model, whole.model)
    assert Scores.load(tmp_path / "cut") == Scores.load(tmp_path / "whole")
    assert not (tmp_path / "cut" / "state" / "score").exists()
    compressed(host, "60%", config, tmp_path / "cut", digits(flip=0.5))  # other images: what is there is not theirs
    assert written[5:] == ([0, 1, 2, 3] if phase == "repair" else [])


def test_a_folder_is_held_by_one_process(tmp_path: Path, caplog: Any) -> None:
    holds = "import sys, pathlib; from spvit.train.lock import locked\n"
    holds += "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", holds, str(tmp_path)], **pipes) as other:
        other.stdout.readline()
        words = rf"output .* is in use by process {other.pid} on .* since 20.*; wait for its end, or name another"
        with pytest.raises(RunFolderError, match=words), RunFolder(tmp_path).held():
            pass
        other.kill()
        other.wait()
    assert (tmp_path / ".lock").exists()
    (tmp_path / ".lock").write_text('{"host": "elsewhere", "process": 7, "since": "noon"}')
    (tmp_path / ".model.json.12.tmp").touch()
    with RunFolder(tmp_path).held():
        assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
        assert not RunFolder(tmp_path).used
    assert "was left by process 7 on elsewhere since noon; if that still runs there, end one" in caplog.text
    assert not any(tmp_path.iterdir())
    with pytest.raises(OSError, match="Not a directory"), locked(Path("/dev/null/run")):
        pass


def test_a_folder_that_is_a_link_to_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    with (
        pytest.raises(RunFolderError, match="run is a link to .*gone, which does not exist; make that first"),
        RunFolder(tmp_path / "run").held(),
    ):
        pass


def test_files_that_cannot_be_written_leave_the_old_ones(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "old")

    def fails(path: Path) -> None:
        path.write_text("half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"a\.json could not be written \(No space left on device\); what was there"):
        replace_atomically(tmp_path / "a.json", fails)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "old")]


def test_files_of_a_run_have_the_permissions_of_its_folder(tmp_path: Path) -> None:
    for mode, expected in ((0o2770, 0o660), (0o750, 0o640), (0o700, 0o600)):
        folder = tmp_path / oct(mode)
        folder.mkdir()
        folder.chmod(mode)
        RunFolder(folder).write_settings("train", "seed: 0")
        write_state(folder / "state" / "dense" / "best.safetensors", {"a": torch.ones(1)}, {})
        RunFolder(folder).write_scores(Scores((), 8, "", "logits"))
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) == 5
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {expected}
