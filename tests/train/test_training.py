"""The loop and the pipeline: exact continuation, what is recorded, and what a diverging run leaves."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Subset

import spvit
from spvit.architecture import FFN, Architecture, Attention, Block
from spvit.cost import count_params
from spvit.errors import BudgetError, CalibrationError, DataError, RunError, RunFolderError
from spvit.search.budget_loss import BudgetLoss
from spvit.search.network import gated_layers, make_searchable, search_record
from spvit.train.compress import compress
from spvit.train.data import calibration
from spvit.train.figures import Evaluation
from spvit.train.loop import Loop, Phase, run_phase
from spvit.train.optimizers import learning_rate_at, optimizer_of
from spvit.train.run_folder import RunFolder
from spvit.train.settings import CompressConfig, ImageConfig, PhaseConfig, SearchConfig
from training import compressed, digits, micro_host, run_in, short, short_search, states_equal


class Killed(BaseException):
    """Stands for a kill: nothing in the loop may catch it."""


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def search_phase(epochs: int = 3, **settings: object) -> Phase:
    net = make_searchable(micro_host())
    return Phase("search", net, short_search(epochs, **settings), BudgetLoss(net, macs="60%"))


def kill_at(phase: Phase, step: int) -> None:
    """Make the phase's budget loss raise at a step, in the middle of an epoch."""
    budget, calls = phase.budget, []

    class Fatal:
        layers, cost, target = budget.layers, budget.cost, budget.target
        expected_cost = budget.expected_cost

        def __call__(self):
            calls.append(1)
            if len(calls) == step:
                raise Killed
            return budget()

    phase.budget = Fatal()


def test_a_phase_ends_when_its_minutes_are_over_and_is_not_gone_on_with(tmp_path: Path) -> None:
    model, config = micro_host(), short(5, minutes=1e-9)
    figures = run_phase(Phase("finetune", model, config), run_in(tmp_path, digits()))
    steps, evaluations = (
        [line for line in lines(tmp_path) if line["event"] == event] for event in ("step", "evaluation")
    )
    assert (len(steps), len(evaluations)) == (0, 1)  # one step, which is not one to record
    assert evaluations[0]["epoch"] == 1
    again = micro_host()
    assert run_phase(Phase("finetune", again, config), run_in(tmp_path, digits())) == figures
    assert states_equal(again, model)


def test_minutes_of_fine_tuning_leave_room_for_as_many_epochs_as_fit() -> None:
    tuned = CompressConfig(minutes=5).finetuning
    assert (tuned.minutes, tuned.epochs) == (5, 10_000)
    tuned = CompressConfig(minutes=5, epochs=3).finetuning
    assert (tuned.minutes, tuned.epochs) == (5, 3)
    with pytest.raises(DataError, match="minutes is 0, expected above 0"):
        CompressConfig(minutes=0)


@pytest.mark.parametrize(("kind", "repeats"), [("dense", 0), ("search", 0), ("dense", 3)])
def test_continued_run_equals_uninterrupted_run_exactly(tmp_path: Path, kind: str, repeats: int) -> None:
    images = digits(mixup=0.2, random_erasing=0.2, color_jitter=0.2, repeated_augmentation=repeats)

    def phase(epochs: int = 3) -> Phase:
        if kind == "search":
            return search_phase(epochs, budget_warmup=0.8)
        return Phase("dense", micro_host(drop_path_rate=0.2), short(3))

    whole, cut = phase(), phase()
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    figures = run_phase(whole, run_in(tmp_path / "whole", images, log_every=4))
    if kind == "search":
        kill_at(cut, 16)  # 11 steps an epoch: in the second epoch
        with pytest.raises(Killed):
            run_phase(cut, run_in(tmp_path / "cut", images, log_every=4))
    else:
        hook = cut.model.register_forward_pre_hook(_raise_at(17))
        with pytest.raises(Killed):
            run_phase(cut, run_in(tmp_path / "cut", images, log_every=4))
        hook.remove()
    again = phase()
    torch.manual_seed(99)  # what happened before must not matter
    continued = run_phase(again, run_in(tmp_path / "cut", images, log_every=4))
    assert states_equal(whole.model, again.model)
    assert continued == figures
    whole_lines, cut_lines = lines(tmp_path / "whole"), lines(tmp_path / "cut")
    for values in (*whole_lines, *cut_lines):
        for name in ("images_per_s", "data_wait"):
            values.pop(name, None)
    assert cut_lines == whole_lines
    assert not states_equal(whole.model, phase().model)


def _raise_at(call: int):
    calls = []

    def hook(module, arguments):
        calls.append(1)
        if len(calls) == call:
            raise Killed

    return hook


def test_search_records_budget_and_kinds(tmp_path: Path) -> None:
    phase = search_phase(1)
    before = copy.deepcopy(phase.model)
    run_phase(phase, run_in(tmp_path, digits(), log_every=5))
    recorded = lines(tmp_path)
    steps = [values for values in recorded if values["event"] == "step"]
    assert [values["step"] for values in steps] == [5, 10, 11]
    for values in steps:
        assert values["target"] == 0.6
        assert sum(values["kinds"].values()) == 2
        assert values["loss"] == pytest.approx(values["task_loss"] + values["budget_loss"], rel=1e-5)
    assert recorded[-1]["event"] == "evaluation"
    assert recorded[-1]["images"] == 360
    assert not states_equal(before, phase.model)


@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_the_weight_of_the_budget_rises_over_its_share_of_the_search(tmp_path: Path, warmup: float) -> None:
    phase = search_phase(2, budget_warmup=warmup, gate_learning_rate=0.0)
    whole = phase.budget().item()
    run_phase(phase, run_in(tmp_path, digits(), log_every=1))
    found = [values["budget_loss"] / whole for values in lines(tmp_path) if values["event"] == "step"]
    rising = round(22 * warmup)  # 11 steps an epoch
    expected = [(step + 1) / rising for step in range(rising)] + [1.0] * (22 - rising)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_gates_have_an_optimizer_of_their_own_at_a_constant_rate(tmp_path: Path, optimizer: str) -> None:
    still = {"learning_rate": 0.0, "minimum_learning_rate": 0.0, "gate_learning_rate": 0.01}
    phase = search_phase(1, optimizer=optimizer, **still)
    before = {name: value.clone() for name, value in phase.model.named_parameters()}
    run_phase(phase, run_in(tmp_path, digits()))
    for name, value in phase.model.named_parameters():
        assert torch.equal(value, before[name]) != name.endswith("gate_logits"), name


def test_biases_norms_and_what_the_host_exempts_do_not_decay() -> None:
    host = micro_host()
    blocks = tuple(Block(Attention(kind), FFN.whole(96)) for kind in ("skip", "conv1"))
    # Constants are vectors by token there: biases too.
    model = spvit.prune(host, Architecture(blocks, "linear", "mean"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    exempt, decayed = optimizer_of(model, PhaseConfig(), 1).param_groups
    assert exempt["weight_decay"] == 0
    found = {names[id(parameter)] for parameter in decayed["params"]}
    assert {"blocks.0.mlp.fc1.weight", "blocks.1.attn.conv_in.weight"} <= found
    assert all(name.endswith("weight") and ".norm" not in name and ".bn" not in name for name in found)
    left = {names[id(parameter)] for parameter in exempt["params"]}
    assert {"pos_embed", "cls_token", "blocks.0.attn.mean.bias", "blocks.1.attn.prefix.0.bias"} <= left


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_search_moves_the_cost_to_the_budget(tmp_path: Path, precision: str) -> None:
    phase = search_phase(4, budget_weight=200.0)
    run_phase(phase, run_in(tmp_path, digits(), precision=precision))
    cost = phase.budget.expected_cost().item() / phase.budget.cost.dense
    assert cost == pytest.approx(0.6, abs=0.12)
    assert all(parameter.dtype == torch.float32 for parameter in phase.model.parameters())


def test_loss_that_is_not_finite_stops_and_keeps_the_last_state(tmp_path: Path) -> None:
    run_phase(search_phase(1), run_in(tmp_path, digits()))
    phase = search_phase(2)
    with torch.no_grad():
        hook = gated_layers(phase.model)[0][0].register_forward_hook(
            lambda module, inputs, output: output * float("nan")
        )
    with pytest.raises(RunError, match=r"became nan at one of steps 12 to 20 of search \(epoch 2\).*gate logits"):
        run_phase(phase, run_in(tmp_path, digits()))
    hook.remove()
    assert [path.name for path in (tmp_path / "state" / "search").iterdir()] == ["epoch-0001.safetensors"]
    run_phase(search_phase(2), run_in(tmp_path, digits()))


def test_distillation_pulls_towards_the_teacher(tmp_path: Path) -> None:
    teacher = micro_host(seed=5)
    images = digits()
    gaps = []
    for share in (0.0, 1.0):
        student = micro_host(seed=1)
        folder = tmp_path / str(share)
        folder.mkdir()
        run_phase(Phase("finetune", student, short(3, distillation=share), teacher=teacher), run_in(folder, images))
        batch = torch.stack([images.validation[index][0] for index in range(64)])
        with torch.no_grad():
            gaps.append((student.eval()(batch).softmax(1) - teacher.eval()(batch).softmax(1)).abs().mean().item())
    assert gaps[1] < 0.5 * gaps[0]


def test_learning_rate_warms_up_and_falls_to_the_minimum() -> None:
    rates = [learning_rate_at(step, 100, 10, 1.0, 0.01) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(rates) == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate_at(100, 100, 10, 1.0, 0.01) == pytest.approx(0.01)
    assert {learning_rate_at(step, 100, 0, 0.5, minimum) for minimum in (0.5, 1.0) for step in (0, 50, 100)} == {0.5}


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"epochs is -1, expected 0 or more"):
        run_phase(Phase("dense", micro_host(), short(-1)), run_in(tmp_path, digits()))
    with pytest.raises(DataError, match=r"distillation is 2.0, expected 0 or more, at most 1"):
        run_phase(Phase("dense", micro_host(), short(1, distillation=2.0)), run_in(tmp_path, digits()))
    for name, value in (("budget_warmup", 1.5), ("budget_weight", -1.0)):
        with pytest.raises(DataError, match=f"{name} is {value}, expected 0 or more"):
            run_phase(search_phase(1, **{name: value}), run_in(tmp_path, digits()))
    with pytest.raises(DataError, match=r"precision is 'fp16', expected auto or fp32 or bf16"):
        run_phase(Phase("dense", micro_host(), short(1)), run_in(tmp_path, digits(), precision="fp16"))


@pytest.mark.parametrize("initialise", ["search", pytest.param("host", marks=pytest.mark.slow)])
def test_compress_writes_a_run_folder_and_continues_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, initialise: str
) -> None:
    host, images = micro_host(), digits()
    before = copy.deepcopy(host)
    config = CompressConfig(dense=short(1), search=short_search(2), finetune=short(2), initialise=initialise)
    whole = compressed(host, "60%", config, tmp_path / "whole", images)
    assert states_equal(host, before)
    loaded = spvit.load(tmp_path / "whole")
    assert states_equal(loaded, whole.model)
    assert Architecture.load(tmp_path / "whole" / "architecture.json") == whole.architecture
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["pruned"]["accuracy"] == whole.pruned.accuracy
    costs = search_record(make_searchable(host)).costs["macs"]
    assert costs.of(whole.architecture) == pytest.approx(0.6 * costs.dense, rel=0.005)
    save = Loop._save

    def save_and_die(loop: Loop, figures: Evaluation | None = None) -> None:
        save(loop, figures)
        if (loop.phase.name, loop.place) == ("search", (1, 0)):
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_save", save_and_die)
        with pytest.raises(Killed):
            compressed(host, "60%", config, tmp_path / "cut", images)
    compressed(host, "60%", replace(config, finetune=short(0)), tmp_path / "cut", images)
    continued = compressed(host, "60%", config, tmp_path / "cut", images)
    assert states_equal(continued.model, whole.model)


@pytest.mark.slow
def test_a_folder_is_not_continued_with_another_budget(tmp_path: Path) -> None:
    host, images = micro_host(), digits()
    for name, epochs in (("scored", 0), ("searched", 1)):
        config = CompressConfig(search=short_search(epochs), finetune=short(1))
        first = compressed(host, "60%", config, tmp_path / name, images)
        with pytest.raises(
            (BudgetError, RunFolderError), match=r"not the .*55.0%.* asked for|fine-tuned another architecture"
        ):
            compressed(host, "55%", config, tmp_path / name, images)
        assert Architecture.load(tmp_path / name / "architecture.json") == first.architecture


@pytest.mark.slow
def test_scores_stay_in_the_run_folder_for_another_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, images = micro_host(), digits()
    config = CompressConfig(epochs=0, calibration_images=128)
    first = compressed(host, "60%", config, tmp_path / "first", images)
    fresh = compressed(host, "80%", config, tmp_path / "fresh", images)
    monkeypatch.setattr("spvit.train.compress.score", lambda *args, **settings: pytest.fail("scored again"))
    (tmp_path / "first" / "architecture.json").unlink()
    again = compressed(host, "60%", config, tmp_path / "first", images)
    assert again.architecture == first.architecture
    config = replace(config, scores=str(tmp_path / "first"))
    other = compressed(host, "80%", config, tmp_path / "other", images)
    assert other.architecture == fresh.architecture != first.architecture
    assert spvit.Scores.load(tmp_path / "other") == spvit.Scores.load(tmp_path / "first")
    with pytest.raises(CalibrationError, match="the scores are of other weights"):
        compress(micro_host(seed=1), images, "60%", config=config)
    with pytest.raises(CalibrationError, match="the scores are by objective logits, not tokens; leave the objective o"):
        compress(host, images, "60%", config=replace(config, objective="tokens"))
    with pytest.raises(CalibrationError, match="holds no scores that can be read"):
        compress(host, images, "60%", config=replace(config, scores=str(tmp_path / "none")))
    with pytest.raises(DataError, match="decide without a search; leave them out, or dense.epochs and search.ep"):
        compress(host, images, "60%", config=replace(config, epochs=1, search=short_search(1)))


def test_compress_without_a_folder_returns_a_plain_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = CompressConfig(search=short_search(1), finetune=short(1))
    small = compress(micro_host(), digits(), "70%", config=config)
    assert small(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    host, config = micro_host(), CompressConfig(epochs=0, calibration_images=128)
    small = compress(host, digits(), params="80%", config=config)
    assert spvit.cost(host)["params"] * 0.8 == pytest.approx(count_params(small), rel=0.005)
    with pytest.raises(BudgetError, match="one of macs, params or latency, found macs and params"):
        compress(host, digits(), "50%", params="50%")
    assert not list(tmp_path.iterdir())


def test_calibration_gives_all_views_of_an_image_in_one_half() -> None:
    images = digits(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), batch_size=200)  # a view is the image
    few, same, other = (torch.cat(list(calibration(images, seed, 1301))) for seed in (1, 1, 2))
    assert few.shape == (1301, 1, 8, 8)
    assert len(few.flatten(1).unique(dim=0)) == 1301
    assert torch.equal(few, same)
    assert not torch.equal(few, other)
    many = torch.cat(list(calibration(images, seed=1, count=2999))).flatten(1)
    assert len(many) == 2999
    halves = many[:1500], many[1500:]
    assert [len(half.unique(dim=0)) for half in halves] == [719, 718]
    assert len(many.unique(dim=0)) == 1437


def test_the_repair_sees_more_views_than_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    monkeypatch.setattr(
        "spvit.train.compress.calibration",
        lambda images, seed, count: counts.append(count) or calibration(images, seed, count),
    )
    images = digits(batch_size=16)
    few = Subset(images.train, range(16))  # which are cropped anew, or the layers' inputs would outnumber them
    for some in (images, replace(images, train=few, views=few)):
        compress(micro_host(), some, "80%", config=CompressConfig(epochs=0, calibration_images=64, repair_views=3))
    assert counts == [64, 192] * 2


def test_compress_refuses_before_it_trains(tmp_path: Path) -> None:
    host, images = micro_host(), digits()
    with pytest.raises(spvit.BudgetError, match="smallest reachable"):
        compress(host, images, "0.01%", output=tmp_path / "run")
    with pytest.raises(DataError, match="initialise is 'luck', expected search or host"):
        compress(host, images, "50%", output=tmp_path / "run", config=CompressConfig(initialise="luck"))
    with pytest.raises(BudgetError, match="multiple is 0, expected 1 or more units"):
        compress(host, images, "50%", output=tmp_path / "run", config=CompressConfig(multiple=0))
    with pytest.raises(DataError, match="keep_best is on for the search"):
        CompressConfig(search=short_search(1, keep_best=True))
    with pytest.raises(DataError, match="nothing is to be trained, but search.epochs is 1; leave one of the two"):
        CompressConfig(epochs=0, search=short_search(1))
    assert not (tmp_path / "run").exists()


def test_a_run_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="is in use; name another folder"):
        RunFolder.open(tmp_path / "used", resume=False)
    with pytest.raises(RunFolderError, match="holds no run to continue"):
        RunFolder.open(tmp_path / "new", resume=True)
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder.open(tmp_path / "used" / "notes.txt", resume=False)


@pytest.mark.slow
def test_a_phase_that_only_harms_ends_with_the_weights_from_before(tmp_path: Path) -> None:
    images = digits()
    model = micro_host()
    run_phase(Phase("dense", model, short(4, learning_rate=5e-3)), run_in(tmp_path, images))
    start = copy.deepcopy(model)
    settings = {"learning_rate": 0.5, "clip_gradient": 0.0}
    harmed = copy.deepcopy(model)
    worse = run_phase(Phase("harmed", harmed, short(1, **settings)), run_in(tmp_path, images))
    figures = run_phase(Phase("kept", model, short(1, **settings, keep_best=True)), run_in(tmp_path, images))
    assert figures.accuracy > worse.accuracy
    assert states_equal(model, start)
    assert not states_equal(harmed, start)


@pytest.mark.parametrize("keep_best", [pytest.param(True, marks=pytest.mark.slow), False])
def test_compress_ends_with_the_repaired_network_where_fine_tuning_only_harms(tmp_path: Path, keep_best: bool) -> None:
    defaults = CompressConfig().finetune
    assert defaults.keep_best
    harmful = replace(defaults, learning_rate=0.5, clip_gradient=0.0, keep_best=keep_best)
    config = CompressConfig(dense=short(4, learning_rate=5e-3), epochs=1, finetune=harmful, calibration_images=128)
    found = compressed(micro_host(), "80%", config, tmp_path, digits())
    assert (found.pruned == found.after_pruning) == keep_best
    assert (found.pruned.accuracy < found.after_pruning.accuracy) != keep_best


@pytest.mark.parametrize(
    "settings",
    [pytest.param({"averaging_epochs": 0.5}, marks=pytest.mark.slow), {"averaging_epochs": 0.5, "keep_best": True}],
)
def test_averaged_and_best_weights_survive_a_kill(tmp_path: Path, settings: dict[str, object]) -> None:
    images, names = digits(), ("plain", "whole", "cut")
    models = {name: micro_host() for name in names}
    for name in names:
        (tmp_path / name).mkdir()
    run_phase(Phase("dense", models["plain"], short(3)), run_in(tmp_path / "plain", images))
    whole = run_phase(Phase("dense", models["whole"], short(3, **settings)), run_in(tmp_path / "whole", images))
    hook = models["cut"].register_forward_pre_hook(_raise_at(20))  # in the second epoch, evaluations counted
    with pytest.raises(Killed):
        run_phase(Phase("dense", models["cut"], short(3, **settings)), run_in(tmp_path / "cut", images))
    hook.remove()
    assert (tmp_path / "cut" / "state" / "dense" / "epoch-0001.safetensors").is_file()
    again = micro_host(seed=1)
    assert run_phase(Phase("dense", again, short(3, **settings)), run_in(tmp_path / "cut", images)) == whole
    assert states_equal(again, models["whole"])
    assert not states_equal(models["whole"], models["plain"])


def test_the_average_reaches_back_so_many_epochs_from_the_start(tmp_path: Path) -> None:
    model, images = micro_host(), digits()
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    phase = Phase("dense", model, short(2, averaging_epochs=1.5))
    loop = Loop(phase, run_in(tmp_path, images))
    decay, step, steps = math.exp(-1 / (1.5 * len(loop.train))), loop.step, 0

    def recorded(*args: Any) -> dict[str, torch.Tensor]:
        nonlocal steps
        losses = step(*args)
        for key, value in loop.accelerator.unwrap_model(loop.model).state_dict().items():
            expected[key] = decay * expected[key] + (1 - decay) * value
        steps += 1
        return losses

    loop.step = recorded
    loop.run()
    assert steps == 2 * len(loop.train)
    for key, value in model.state_dict().items():
        assert torch.allclose(value, expected[key], atol=1e-6), key


def test_averaging_is_checked() -> None:
    with pytest.raises(DataError, match=r"averaging_epochs is -0\.5, expected 0 or more"):
        run_phase(Phase("dense", micro_host(), short(1, averaging_epochs=-0.5)), run_in(Path(), digits()))


def test_compress_refuses_at_once_what_it_could_not_finish(tmp_path: Path) -> None:
    fewer = replace(digits(), classes=("0", "1"))
    with pytest.raises(DataError, match="the images have 2 classes, but the host tells 10 apart"):
        spvit.compress(micro_host(), fewer, "60%")
    with pytest.raises(spvit.UnsupportedHostError, match="Linear is not supported"):
        spvit.compress(torch.nn.Linear(2, 2), digits(), "60%", output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_host_with_channels_last_is_compressed(tmp_path: Path) -> None:
    host = micro_host().to(memory_format=torch.channels_last)
    config = CompressConfig(finetune=short(1), calibration_images=128)
    spvit.compress(host, digits(), "70%", output=tmp_path / "run", config=config)
    assert type(spvit.load(tmp_path / "run")) is type(host)


def test_a_folder_of_the_user_stays_when_its_run_is_refused(tmp_path: Path) -> None:
    for folder, kept in ((tmp_path / "there", True), (tmp_path / "new", False)):
        if kept:
            folder.mkdir()
        run = RunFolder.open(folder)

        def refused(run: RunFolder = run) -> None:
            with run.held():
                run.write_settings("compress", "macs: 1%\n")
                raise BudgetError("out of reach")

        with pytest.raises(BudgetError):
            refused()
        assert folder.is_dir() == kept
        assert not kept or not any(folder.iterdir())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PhaseConfig(learning_rate=-1e-4), "learning_rate is -0.0001, expected 0 or more"),
        (lambda: PhaseConfig(learning_rate=math.inf), "learning_rate is inf, expected 0 or more"),
        (lambda: PhaseConfig(minimum_learning_rate=math.nan), "minimum_learning_rate is nan, expected 0 or more"),
        (lambda: PhaseConfig(learning_rate=100), "learning_rate is 100, expected 0 or more, at most 10"),
        (lambda: PhaseConfig(minimum_learning_rate=11), "minimum_learning_rate is 11, expected 0 or more, at most 10"),
        (lambda: PhaseConfig(warmup_epochs=-1.0), "warmup_epochs is -1.0, expected 0 or more"),
        (lambda: PhaseConfig(reference_batch=-512), "reference_batch is -512, expected 0 or more"),
        (lambda: PhaseConfig(distillation_temperature=0.0), "distillation_temperature is 0.0, expected above 0"),
        (lambda: PhaseConfig(distillation_kind="firm"), "distillation_kind is 'firm', expected soft or hard"),
        (lambda: PhaseConfig(optimizer="lion"), "optimizer is 'lion', expected adamw or muon"),
        (
            lambda: CompressConfig(shard=True, finetune=PhaseConfig(optimizer="muon")),
            "finetune.optimizer is 'muon', which takes whole matrices, but shard parts them",
        ),
        (lambda: SearchConfig(gate_learning_rate=-0.1), "gate_learning_rate is -0.1, expected 0 or more"),
        (lambda: SearchConfig(gate_learning_rate=11), "gate_learning_rate is 11, expected 0 or more, at most 10"),
        (lambda: SearchConfig(temperature=0.0), "temperature is 0.0, expected above 0"),
        (lambda: SearchConfig(gate_logit=math.nan), "gate_logit is nan, expected a finite number"),
        (lambda: ImageConfig(mixup=-0.1), "images.mixup is -0.1, expected 0 or more"),
        (lambda: ImageConfig(flip=1.5), "images.flip is 1.5, expected 0 or more, at most 1"),
        (lambda: ImageConfig(random_erasing=2.0), "images.random_erasing is 2.0, expected 0 or more, at most 1"),
        (lambda: ImageConfig(color_jitter=-1.0), "images.color_jitter is -1.0, expected 0 or more"),
        (lambda: ImageConfig(crop_scale=(0.5, 1.5)), r"images.crop_scale is \(0.5, 1.5\), expected above 0, at most 1"),
        (lambda: ImageConfig(crop_scale=(0.9, 0.1)), r"images.crop_scale is \[0.9, 0.1\], expected the least first"),
        (lambda: ImageConfig(std=(0.2, 0.0, 0.2)), r"images.std is \(0.2, 0.0, 0.2\), expected above 0, at most 1"),
        (lambda: ImageConfig(mean=(123.0,)), r"images.mean is \(123.0,\), expected 0 or more, at most 1"),
        (lambda: ImageConfig(background=255.0), "images.background is 255.0, expected 0 or more, at most 1"),
    ],
)
def test_every_setting_has_its_range(make: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        make()


def test_an_optimizer_that_an_old_timm_lacks_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spvit.train.settings, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="which this timm does not have; pip install --upgrade timm"):
        PhaseConfig(optimizer="muon")
