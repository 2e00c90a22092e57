"""Trackers get what metrics.jsonl holds, once, also of a run that was continued; and functions get progress."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import spvit
from spvit.errors import DataError, RunError
from spvit.train import tracking
from spvit.train.loop import Phase, run_phase
from spvit.train.run_folder import DENSE, FINETUNE, RunFolder
from spvit.train.settings import CompressConfig, LoopConfig
from training import GREY, compressed, digits, micro_host, run_in, short, short_search

Curves = dict[str, dict[int, float]]


def recorded(folder: Path) -> Curves:
    """Return the figures of metrics.jsonl by name and step, steps of later phases behind those of earlier ones."""
    found: Curves = defaultdict(dict)
    before, last, phase = 0, 0, ""
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if values["phase"] != phase:
            phase, before = values["phase"], before + last
        last = values.pop("step", last)
        values |= {f"kinds.{kind}": count for kind, count in values.pop("kinds", {}).items()}
        for name, value in values.items():
            if name not in ("phase", "event", "epoch"):
                found[f"{phase}/{values['event']}/{name}"][before + last] = value
    return dict(found)


def tensorboard_curves(folder: Path) -> Curves:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    found: Curves = {}
    for name in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(name)]
        assert len(steps) == len(set(steps)), f"{name} has a step twice"
        found[name] = {event.step: event.value for event in events.Scalars(name)}
    return found


def same(curves: Curves, others: Curves) -> bool:
    return curves.keys() == others.keys() and all(curves[name] == pytest.approx(others[name]) for name in curves)


def test_tensorboard_gets_the_figures_of_all_phases(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    settings = CompressConfig(
        search=short_search(1), finetune=short(1), calibration_images=64, track="tensorboard", log_every=5
    )
    compressed(micro_host(), "60%", settings, tmp_path / "run", digits())
    curves = tensorboard_curves(tmp_path / "run")
    assert {"search/step/cost", "search/step/kinds.msa", "finetune/evaluation/accuracy"} <= curves.keys()
    assert same(curves, recorded(tmp_path / "run"))
    [hparams] = (tmp_path / "run" / "tensorboard").glob("*/hparams.yml")
    assert "finetune.epochs: 1\n" in hparams.read_text()


def test_a_run_that_was_cut_short_goes_on_without_a_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    run, save = run_in(tmp_path, digits(), track=("tensorboard",), log_every=3), RunFolder.save_state

    def fail(folder: RunFolder, phase: str, epoch: int, *more: object) -> None:
        if epoch == 2:
            raise RunError("the disk is full")
        save(folder, phase, epoch, *more)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_state", fail)
        with pytest.raises(RunError, match="the disk is full"):
            run_phase(Phase(FINETUNE, micro_host(), short(2)), run)
    run_phase(Phase(FINETUNE, micro_host(), short(2)), run)
    assert same(tensorboard_curves(tmp_path), recorded(tmp_path))
    run_phase(Phase(FINETUNE, micro_host(), short(2)), run)  # done: nothing more is opened
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 2
    assert len(list((tmp_path / "tensorboard").glob("*/hparams.yml"))) == 1


def tracked(folder: Path, tracker: str, *phases: str) -> None:
    """Run phases of one epoch in a folder."""
    folder.mkdir()
    for phase in phases:
        run_phase(Phase(phase, micro_host(), short(1)), run_in(folder, digits(), track=tracker))


def test_wandb_offline_takes_the_name_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracked(tmp_path / "small", "wandb", FINETUNE)
    [kept] = (tmp_path / "small" / "wandb").glob("offline-run-*")
    name = json.loads((tmp_path / "small" / "tracking.json").read_text())["wandb"]
    assert kept.name.endswith(f"-{name}")


def test_mlflow_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    tracked(tmp_path / "small", "mlflow", DENSE, FINETUNE)
    [found] = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert found.info.run_name == "small"
    assert found.data.params["log_every"] == "20"
    assert found.data.metrics["finetune/step/loss"] == pytest.approx(
        list(recorded(tmp_path / "small")["finetune/step/loss"].values())[-1]
    )


def test_tracker_that_fails_ends_the_run_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ConnectionError("no such server\nand a long story")

    monkeypatch.setitem(tracking._OPEN, "mlflow", fail)
    monkeypatch.setattr("spvit.train.settings.find_spec", lambda name: name)
    with pytest.raises(RunError, match=r"track mlflow failed \(no such server\); mend it, and continue with --resume$"):
        tracked(tmp_path / "run", "mlflow", FINETUNE)


def test_what_is_no_tracker_or_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="track is 'excel', expected tensorboard, wandb, mlflow, or several of them"):
        LoopConfig(track="excel")
    monkeypatch.setattr("spvit.train.settings.find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(DataError, match="track wandb needs a package; install it with: pip install wandb"):
        LoopConfig(track="tensorboard, wandb")
    assert LoopConfig(track="mlflow tensorboard mlflow").trackers == ("mlflow", "tensorboard")


def test_functions_get_the_progress_of_every_part(tmp_path: Path) -> None:
    calls = []
    host, images = micro_host(), torch.randn(32, 1, 8, 8)
    scores = spvit.score(host, images, multiple=4, report=lambda *call: calls.append(call))
    assert calls == [("score", 1, 2, {}), ("score", 2, 2, {})]
    calls.clear()
    architecture = spvit.decide(host, macs="60%", scores=scores)
    spvit.prune(host, architecture, repair=images, report=lambda *call: calls.append(call))
    assert calls == [("repair", 1, 2, {}), ("repair", 2, 2, {})]
    calls.clear()
    config = CompressConfig(finetune=short(2), calibration_images=64)
    spvit.compress(host, digits(), "60%", config=config, preprocessing=GREY, report=lambda *call: calls.append(call))
    phases = [phase for phase, *_ in calls]
    assert list(dict.fromkeys(phases)) == ["score", "repair", "finetune"]
    steps = [call for call in calls if call[0] == "finetune"]
    losses = [done for _, done, _, figures in steps if "accuracy" not in figures]
    assert losses == [*range(1, steps[-1][2] + 1)]
    assert [figures["images"] for *_, figures in steps if "accuracy" in figures] == [360, 360]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spvit.compress(host, digits(), "60%", config=config, output=tmp_path / "run", report=stop)
