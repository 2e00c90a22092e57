"""What ends training early, and learning rates by layer."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import timm
import torch

import spvit
from command import digits_recipe, refused
from spvit.architecture import FFN, Architecture, Attention, Block
from spvit.cli.main import main
from spvit.errors import DataError
from spvit.search.network import gate_parameters, make_searchable
from spvit.train.loop import Loop, Phase, run_phase
from spvit.train.optimizers import groups_of, optimizer_of, tensors_of
from spvit.train.settings import PhaseConfig, SearchConfig
from training import digits, micro_host, run_in, short, short_search, states_equal


def test_a_phase_ends_when_nothing_gets_better(tmp_path: Path) -> None:
    settings = {"learning_rate": 0.0, "minimum_learning_rate": 0.0, "keep_best": True, "patience": 2}
    run = run_in(tmp_path, digits(batch_size=512))
    figures = run_phase(Phase("dense", micro_host(), short(5, **settings)), run)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [values["epoch"] for values in lines if values["event"] == "evaluation"] == [1, 2]  # all as it was before
    best, _ = run.folder.best("dense")
    assert (best["epoch"], best["gained"]) == (2, 0)
    assert run_phase(Phase("dense", micro_host(), short(5, **settings)), run) == figures
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == len(lines)


def test_weights_are_copied_only_when_they_are_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, best, copied = run_in(tmp_path, digits(batch_size=512)), micro_host(), []
    run.folder.keep_best("dense", 0, 2.0, tensors_of(best))
    monkeypatch.setattr("spvit.train.loop.tensors_of", lambda part: copied.append(part) or tensors_of(part))
    model = micro_host(seed=1)
    run_phase(Phase("dense", model, short(1, keep_best=True)), run)
    assert copied.count(model) == 1  # for the state
    assert states_equal(model, best)


def test_patience_needs_weights_to_return_to() -> None:
    with pytest.raises(DataError, match="patience is 3, but no weights are kept to return to; give keep_best too"):
        PhaseConfig(patience=3)
    with pytest.raises(DataError, match="patience is -1, expected 0 or more"):
        PhaseConfig(patience=-1)


@pytest.mark.parametrize("form", ["dense", "pruned", "searchable", "swin"])
def test_learning_rates_fall_from_layer_to_layer(form: str) -> None:
    model = micro_host()
    if form == "pruned":
        blocks = (Block(Attention("conv3"), FFN.whole(96)), Block(Attention("skip"), FFN.whole(96)))
        model = spvit.fold(spvit.prune(model, Architecture(blocks, "linear", "mean")))
    elif form == "swin":
        sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": [2], "num_heads": [3]}
        model = timm.create_model("swin_tiny_patch4_window7_224", **sizes)
    config = (SearchConfig if form == "searchable" else PhaseConfig)(layer_decay=0.5)
    model = make_searchable(model) if form == "searchable" else model
    optimizer = optimizer_of(model, config, 10)
    scales = {id(p): group.get("lr_scale", 1.0) for group in optimizer.param_groups for p in group["params"]}
    assert set(scales) == {id(parameter) for parameter in model.parameters()}
    blocks = "layers.0.blocks" if form == "swin" else "blocks"
    for name, expected in (("patch_embed.", 1 / 8), (f"{blocks}.0.", 1 / 4), (f"{blocks}.1.", 1 / 2), ("head.", 1)):
        own = {scales[id(p)] for key, p in model.named_parameters() if key.startswith(name) and "gate_log" not in key}
        assert own == {expected}
    gates = [parameter for group in groups_of(optimizer, True) for parameter in group["params"]]
    assert [id(gate) for gate in gates] == ([id(gate) for gate in gate_parameters(model)] if gates else [])
    assert bool(gates) == (form == "searchable")
    rates = {group["weight_decay"] for group in groups_of(optimizer)}
    assert rates == {0, config.weight_decay}


def test_learning_rates_by_layer_reach_the_steps(tmp_path: Path) -> None:
    settings = {"learning_rate": 1e-3, "minimum_learning_rate": 1e-3, "warmup_epochs": 0.0, "weight_decay": 0.0}
    model = micro_host()
    loop = Loop(Phase("dense", model, short(1, layer_decay=0.1, **settings)), run_in(tmp_path, digits()))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    loop.step([(torch.randn(64, 1, 8, 8), torch.arange(64) % 10)], 0)
    # The first step of Adam moves each weight by the learning rate.
    moved = {name: (value.detach() - before[name]).abs().max().item() for name, value in model.named_parameters()}
    expected = {"head.weight": 1e-3, "blocks.1.mlp.fc1.weight": 1e-4, "blocks.0.mlp.fc1.weight": 1e-5}
    assert {name: moved[name] for name in expected} == pytest.approx(expected, rel=0.02)


def test_learning_rates_by_layer_need_a_model_that_says_them() -> None:
    with pytest.raises(
        DataError, match=r"layer_decay is 0.5, but only timm's models say which layer is which; leave i"
    ):
        optimizer_of(torch.nn.Linear(2, 2), PhaseConfig(layer_decay=0.5), 10)
    with pytest.raises(DataError, match=r"layer_decay is 1.5, expected above 0, at most 1"):
        short_search(layer_decay=1.5)


def test_a_run_ends_with_its_state_saved_when_its_hours_are_over(tmp_path: Path, capsys, monkeypatch) -> None:
    made = []

    class Timer(threading.Timer):
        """Goes off when the first step is done, at whatever speed that is."""

        def __init__(self, seconds: float, end) -> None:
            super().__init__(1e9, end)
            made.append((seconds, end))

    monkeypatch.setattr("threading.Timer", Timer)
    step = Loop.step

    def stepped(loop: Loop, *words):
        if len(made) == 1:
            made.append(made[0][1]())
        return step(loop, *words)

    monkeypatch.setattr(Loop, "step", stepped)
    words = ["train", "--recipe", digits_recipe(tmp_path)(dense={"epochs": 1}), "--output", str(tmp_path / "run")]
    assert main([*words, "--max-hours", "0.5"]) == 143
    printed = capsys.readouterr()
    assert "max-hours: 0.5 are over" in printed.out
    assert "stopped by SIGTERM after 0 epochs and 1 steps of dense, where its state is saved; cont" in printed.err
    assert made[0][0] == 1800
    assert main(["train", "--output", str(tmp_path / "run"), "--resume"]) == 0
    refused(capsys, "max_hours is 0.0, expected above 0", *words, "--max-hours", "0")
