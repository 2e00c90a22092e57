"""Steps of training: gradients of several batches add up, and losses are fetched from the device now and then."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.data import Subset

from command import digits_recipe, refused
from spvit.checkpoint import read_weights
from spvit.errors import DataError, RunError, RunStoppedError
from spvit.search.budget_loss import BudgetLoss
from spvit.search.network import make_searchable
from spvit.train.data import Images
from spvit.train.figures import reference_of
from spvit.train.loop import Loop, Phase, Run, run_phase
from spvit.train.progress import PhaseProgress
from spvit.train.run_folder import RunFolder
from spvit.train.settings import ImageConfig, LoopConfig
from training import digits, micro_host, run_in, short, short_search, states_equal


def steps_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [values for values in lines if values["event"] == "step"]


def few(images: Images) -> Images:
    """Return some of the images: 400 to train on and 40 to validate on."""
    return replace(images, train=Subset(images.train, range(400)), validation=Subset(images.validation, range(40)))


@pytest.mark.parametrize("kind", ["dense", "search"])
def test_batches_that_add_up_train_as_one_large_batch_does(tmp_path: Path, kind: str) -> None:
    found = []
    for parts in (1, 4):
        model, config = micro_host(), short(2, averaging_epochs=1, clip_gradient=0.1)
        model.double()
        phase = Phase("dense", model, config)
        if kind == "search":
            net = make_searchable(model).eval()
            net.train = lambda mode=True, net=net: net  # closed to draws: gates are what evaluation takes
            phase = Phase("search", net, short_search(2), BudgetLoss(net, macs="60%"))
        images = few(digits(batch_size=64 // parts, accumulate=parts, crop_scale=(1, 1), crop_ratio=(1, 1)))
        images = replace(images, train=[(image.double(), label) for image, label in images.train])
        images = replace(images, validation=[(image.double(), label) for image, label in images.validation])
        folder = tmp_path / str(parts)
        folder.mkdir()
        run_phase(phase, run_in(folder, images, log_every=4))
        found.append((phase.model.state_dict(), steps_of(folder)))
    (whole, steps), (summed, others) = found
    assert all(torch.allclose(whole[name], summed[name], rtol=1e-8, atol=1e-10) for name in whole)
    assert [values["step"] for values in steps] == [values["step"] for values in others] == [4, 6, 8, 12]
    for name in ("loss", "task_loss", "learning_rate", *(["budget_loss", "cost"] if kind == "search" else [])):
        assert [values[name] for values in steps] == pytest.approx([values[name] for values in others], rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_adds_up_batches_continues_from_within_an_epoch(tmp_path: Path, optimizer: str) -> None:
    config = short(2, optimizer=optimizer)
    images = few(
        digits(batch_size=16, accumulate=3, mixup=0.2, random_erasing=0.2)
    )  # 8 steps an epoch, a batch left out
    models = []
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        models.append(micro_host(drop_path_rate=0.2))
        phase, run = Phase("dense", models[-1], config), run_in(tmp_path / name, images)
        if name == "cut":
            stopped(phase, run, (0, 5))
            models[-1] = micro_host(seed=1, drop_path_rate=0.2)
            phase = Phase("dense", models[-1], config)
        run_phase(phase, run)
    assert states_equal(*models)
    assert [values["step"] for values in steps_of(tmp_path / "cut")] == [8, 16]


def stopped(phase: Phase, run: Run, place: tuple[int, int]) -> None:
    """Run a phase to a place where it is stopped."""
    loop = Loop(phase, run, lambda: signal.SIGTERM if loop.place == place else 0)
    with pytest.raises(RunStoppedError, match=f"after {place[0]} epochs and {place[1]} steps"):
        loop.run()


def test_more_batches_than_there_are_images_are_refused() -> None:
    with pytest.raises(DataError, match="1437 training images, fewer than images.batch_size 128 times images.accumula"):
        Loop(Phase("dense", micro_host(), short()), run_in(Path(), digits(accumulate=12)))
    with pytest.raises(DataError, match=r"images.accumulate is 0, expected 1 or more"):
        ImageConfig(accumulate=0)


def test_losses_stay_on_the_device_between_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched, calls, tolist = [], [], torch.Tensor.tolist
    run = run_in(tmp_path, digits(), log_every=4)
    loop = Loop(Phase("dense", micro_host(), short(1)), run)
    run.progress.report = lambda phase, done, total, figures: calls.append(figures.get("loss"))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: fetched.append(tensor) or tolist(tensor))
    with run.progress.bar("dense", 11):
        loop._epoch(0, 0)
    assert len([tensor for tensor in fetched if tensor.is_floating_point()]) == 3  # steps 4, 8 and 11
    assert calls == [None] * 3 + [calls[3]] * 4 + [calls[7]] * 3 + [calls[-1]]
    assert calls[3] == steps_of(tmp_path)[0]["loss"]


@pytest.mark.parametrize("stop", ["line", "signal", "minutes"])
def test_a_loss_that_was_not_finite_is_seen_before_anything_is_saved(tmp_path: Path, stop: str) -> None:
    phase = Phase("dense", micro_host(), short(1, minutes=1e-9 if stop == "minutes" else None))
    made = []

    def spoil(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor:
        made.append(1)
        if stop == "signal" and len(made) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return output * (float("nan") if len(made) == 1 else 1)

    phase.model.register_forward_hook(spoil)
    where = {"line": "one of steps 1 to 4", "signal": "one of steps 1 to 2", "minutes": "step 1"}[stop]
    with pytest.raises(RunError, match=f"the loss became nan at {where} of dense .epoch 1.*none was saved yet"):
        run_phase(phase, run_in(tmp_path, digits(), log_every=4))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    loop = Loop(Phase("dense", micro_host(), short(1)), run_in(tmp_path, digits()))
    loop.phase.model.norm.weight.data[3] = torch.inf
    loop.place = 0, 5
    with pytest.raises(RunError, match=r"a weight is not finite after the last step of dense .epoch 1.: learning"):
        loop._save()
    assert RunFolder(tmp_path).newest_state("dense") is None


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()


def test_a_compiled_run_writes_and_continues_what_one_that_is_not_does(tmp_path: Path, monkeypatch) -> None:
    compile_with(monkeypatch, "eager")
    images, found = few(digits(batch_size=64)), []
    for name in ("plain", "compiled", "cut"):
        (tmp_path / name).mkdir()
        run = run_in(tmp_path / name, images, compile=name != "plain")
        for seed in (0, 1) if name == "cut" else (0,):
            model = micro_host(seed=seed, drop_path_rate=0.2)
            phase = Phase("finetune", model, short(2, averaging_epochs=1, keep_best=True))
            if name == "cut" and seed == 0:
                stopped(phase, run, (1, 2))
            else:
                run_phase(phase, run)
        found.append(model)
    assert all(states_equal(found[0], other) for other in found[1:])
    tensors = read_weights(RunFolder(tmp_path / "cut").newest_state("finetune"))
    assert not [name for name in tensors if "_orig_mod" in name]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_features_and_batches_that_add_up_are_compiled_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with(monkeypatch, "eager")
    dense, images = micro_host(num_classes=0), digits(accumulate=2, batch_size=256, held_out=64)
    reference = reference_of(dense, images, LoopConfig())
    batches = [(torch.randn(256, 1, 8, 8), torch.zeros(256))] * 2
    losses = []
    for compiles in (False, True):
        run = replace(run_in(tmp_path, images, compile=compiles), reference=reference)
        loop = Loop(Phase("finetune", micro_host(seed=1, num_classes=0), short(1)), run)
        losses.append([loop.step(batches, step)["loss"] for step in (0, 1)])
    assert losses[0] == losses[1]


def test_a_search_is_not_compiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = make_searchable(micro_host())
    run = replace(run_in(tmp_path, digits(), compile=True), progress=PhaseProgress(Console()))
    loop = Loop(Phase("search", net, short_search(1), BudgetLoss(net, macs="60%")), run)
    assert loop.forward is loop.model
    assert "search is not compiled: each step draws gates" in capsys.readouterr().out
    words = ["search", "--recipe", digits_recipe(tmp_path)(), "--output", str(tmp_path / "run"), "--compile"]
    refused(capsys, "a search is not compiled, as each step draws gates, which choose what runs; leave out", *words)


def test_what_cannot_be_compiled_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("no compiler here")

    compile_with(monkeypatch, fails)
    with pytest.raises(RunError, match=r"torch.compile failed: .*no compiler here.*leave out --compile"):
        run_phase(Phase("dense", micro_host(), short(1)), run_in(tmp_path, digits(), compile=True))
