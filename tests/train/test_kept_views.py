"""Views with the dense model's answers in memory: what is kept, when, and that training by it is the same."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

import spvit
from spvit.errors import DataError, RunStoppedError
from spvit.hosts.calling import batch_first
from spvit.hosts.host import Host
from spvit.hosts.walk import advance, first_inputs
from spvit.repair.objective import Objective
from spvit.speed.benchmark import Program
from spvit.train.data import Images
from spvit.train.figures import Answering, Reference, reference_of
from spvit.train.kept_views import KeptViews, compare_with_kept, fastest_precision, keep_views, most_views
from spvit.train.loop import Loop, Phase, Run
from spvit.train.run_folder import RunFolder
from spvit.train.settings import MOST_EPOCHS, CompressConfig, ImageConfig, LoopConfig, PhaseConfig
from spvit.train.step_loss import StepLoss
from training import digits, micro_host, short, states_equal
from walked_hosts import WALKED_HOSTS, host_and_images


def unlabelled(**settings: object) -> Images:
    return replace(digits(**settings), classes=())


def kept_of(count: int, found: Images, reference: Reference, **more: object) -> KeptViews:
    kept = keep_views(count, found, reference, LoopConfig(), **more)  # type: ignore[arg-type]
    assert kept is not None
    return kept


@pytest.mark.parametrize("name", WALKED_HOSTS)
def test_parts_and_hidden_states_of_all_views_are_kept(name: str) -> None:
    model, dense, x = host_and_images(name)
    some = [(image, 0) for image in torch.cat([x, 2 * x, 3 * x])]
    found = Images(some, some, some, (), spvit.Preprocessing(), ImageConfig(batch_size=2))  # type: ignore[arg-type]
    reference = Reference(dense, Objective.of("auto", dense))
    kept = kept_of(5, found, reference)
    assert len(kept) == 5
    assert len(kept.hidden) == len(dense.blocks) - 1
    assert not any(module._forward_pre_hooks for module in model.modules())
    numbers = torch.tensor([4, 0, 3])
    views = torch.stack([kept[number][0] for number in numbers.tolist()])
    for own, wanted in zip(kept.parts_of(numbers), reference.parts(views), strict=True):
        torch.testing.assert_close(own.float(), wanted, rtol=2**-7, atol=1e-2)
    inputs = first_inputs(dense, [views])
    for index, own in enumerate(kept.hidden_of(numbers)):
        with torch.no_grad():
            advance(dense, index, inputs)
        wanted = batch_first(dense.blocks[index + 1].attention, inputs[0])
        torch.testing.assert_close(own.float(), wanted, rtol=2**-7, atol=1e-2)


def test_views_are_augmented_as_training_images_are_and_drawn_by_the_seed() -> None:
    found = unlabelled(random_erasing=1.0)
    reference = reference_of(micro_host(num_classes=0), found, LoopConfig())
    first, again = (kept_of(64, found, reference) for _ in range(2))
    assert torch.equal(first.views, again.views)
    other = keep_views(64, found, reference, LoopConfig(seed=1))
    assert other is not None
    assert not torch.equal(first.views, other.views)
    plain = kept_of(64, unlabelled(), reference)
    assert not torch.equal(first.views, plain.views)  # less what was erased
    assert len(kept_of(3000, found, reference).views.flatten(1).unique(dim=0)) > 1500  # more than there are images


def step_of(model: torch.nn.Module, run: Run, share: float | None, x: Tensor, labels: Tensor) -> dict[str, float]:
    loop = Loop(Phase("finetune", model, short(1, distillation_hidden=share)), run)
    losses = loop.step([(x, labels)], 0)
    loop.loss.close()
    return {name: float(value) for name, value in losses.items()}


@pytest.mark.parametrize("share", [None, 0.0, 0.5])
def test_a_step_is_the_same_and_does_not_run_the_dense_model(tmp_path: Path, share: float | None) -> None:
    found = unlabelled(batch_size=64)
    reference = reference_of(micro_host(0, num_classes=0), found, LoopConfig())
    kept = kept_of(128, found, reference, hidden=share != 0)
    assert bool(kept.hidden) == (share != 0)
    numbers = torch.randperm(128)[:64]
    drawn, by_number = (micro_host(1, num_classes=0) for _ in range(2))
    run = Run(found, RunFolder(tmp_path), LoopConfig(), reference=reference)
    wanted = step_of(drawn, run, share, kept.views[numbers], torch.zeros(64))
    own = replace(run, images=replace(found, train=kept), kept=kept)
    calls: list[object] = []
    loop = Loop(Phase("finetune", by_number, short(1, distillation_hidden=share)), own)
    handle = reference.host.model.register_forward_pre_hook(lambda *_: calls.append(1))
    losses = {name: float(value) for name, value in loop.step([(kept.views[numbers], numbers)], 0).items()}
    handle.remove()
    assert not calls
    assert losses == pytest.approx(wanted, rel=1e-2)
    start, *ends = (
        parameters_to_vector(own.parameters()).detach() for own in (micro_host(1, num_classes=0), drawn, by_number)
    )
    assert float(F.cosine_similarity(ends[0] - start, ends[1] - start, dim=0)) > 0.98
    batches = list(loop.train)
    assert all(torch.equal(kept.views[own], x) for x, own, _ in batches)  # each view comes with its number


def test_few_minutes_on_a_processor_keep_views(monkeypatch: pytest.MonkeyPatch) -> None:
    found, minutes = unlabelled(), PhaseConfig(minutes=5, epochs=MOST_EPOCHS)
    for value, asked, count in ((0.5, None, 400), (5, None, 4000), (20, None, 4096), (21, None, 0), (5, 0, 0)):
        assert most_views("finetune", replace(minutes, minutes=value, kept_views=asked), found) == count
    assert most_views("finetune", replace(minutes, minutes=0.01), unlabelled(batch_size=32, accumulate=2)) == 64
    assert most_views("finetune", replace(minutes, epochs=10), found) == 0  # of which epochs are of all images
    assert most_views("finetune", PhaseConfig(kept_views=200), found) == 200
    assert most_views("finetune", minutes, digits()) == 0
    assert most_views("finetune", minutes, unlabelled(mixup=0.8)) == 0
    with pytest.raises(DataError, match="finetune.kept_views is 7, but a step takes 64; leave it out"):
        most_views("finetune", PhaseConfig(kept_views=7), unlabelled(batch_size=64))
    monkeypatch.setattr("spvit.train.kept_views.processes", lambda: type("", (), {"num_processes": 2}))
    assert most_views("finetune", minutes, found) == 0
    with pytest.raises(DataError, match="finetune.kept_views is 200, but there are several processes; leave it out"):
        most_views("finetune", PhaseConfig(kept_views=200), found)


def test_where_memory_has_no_room_for_enough_all_are_drawn_anew() -> None:
    found = unlabelled(batch_size=64)
    reference = reference_of(micro_host(num_classes=0), found, LoopConfig())
    each = kept_of(64, found, reference)
    size = sum(own.nbytes for own in (each.views, *each.parts, *each.hidden)) // 64
    assert len(kept_of(1200, found, reference, most_bytes=1100 * size)) == 1100
    assert len(kept_of(200, found, reference, most_bytes=200 * size)) == 200
    for count, room in ((1200, 1000), (200, 199)):
        assert keep_views(count, found, reference, LoopConfig(), most_bytes=room * size) is None


@pytest.mark.parametrize(
    ("found", "settings", "problem"),
    [
        (digits(), {"kept_views": 64}, "the images have labels"),
        (unlabelled(cutmix=1.0), {"kept_views": 64}, "mixup and cutmix mix images anew"),
    ],
)
def test_what_cannot_keep_views_says_so_before_anything_runs(found: Images, settings, problem: str) -> None:
    config = CompressConfig(finetune=short(1, **settings))
    reports: list[object] = []
    host = micro_host(num_classes=10 if found.classes else 0)
    with pytest.raises(DataError, match=f"finetune.kept_views is 64, but {problem}; leave it out"):
        spvit.compress(host, found, "60%", config=config, report=lambda *step: reports.append(step))
    assert not reports


def test_other_commands_keep_none() -> None:
    with pytest.raises(DataError, match="train.kept_views is 64, but only spvit compress keeps them"):
        StepLoss("train", short(1, kept_views=64), micro_host(), None, None, lambda: torch.zeros(1))


@pytest.mark.parametrize(("share", "wanted"), [(0.5, "bf16"), (0.9, "fp32"), (1.5, "fp32")])
def test_mixed_precision_is_taken_where_a_pass_is_much_faster_in_it(
    monkeypatch: pytest.MonkeyPatch, share: float, wanted: str
) -> None:
    taken = itertools.cycle([1.0, share])
    monkeypatch.setattr(Program, "timed", lambda *_: next(taken))
    assert fastest_precision(Host.of(micro_host())) == wanted


def test_passes_in_both_precisions_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    host, types = micro_host(), []
    host.head.register_forward_hook(lambda *args: types.append(args[-1].dtype))
    assert fastest_precision(Host.of(host)) in ("fp32", "bf16")
    assert set(types) == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize(("held_out", "warns"), [(0.0, True), (0.97, False), (1.0, False)])
def test_more_images_are_advised_where_those_learnt_from_are_known_much_better(
    caplog: pytest.LogCaptureFixture, held_out: float, warns: bool
) -> None:
    model, found = micro_host(num_classes=0), unlabelled()
    reference = reference_of(model, found, LoopConfig())
    kept = kept_of(300, found, reference)
    seen = compare_with_kept(held_out, kept, model, found, reference, LoopConfig())
    assert seen == pytest.approx(1, abs=1e-3)  # they are kept in bf16
    assert ("more images would gain more than more minutes" in caplog.text) == warns
    other = micro_host(1, num_classes=0)
    views = kept.views[:256]  # which are compared
    cosines = []
    with torch.no_grad():
        both = (Answering(net, reference)(views) for net in (other, model))
        for own, wanted, mean in zip(*both, reference.means, strict=True):
            cosines.append(F.cosine_similarity(own - mean, wanted - mean, dim=-1).mean())
    naive = torch.stack(cosines).mean()
    assert compare_with_kept(1.0, kept, other, found, reference, LoopConfig()) == pytest.approx(float(naive), abs=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compression_with_kept_views_continues_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr("spvit.train.compress.fastest_precision", lambda _: precision)
    host, found = micro_host(num_classes=0), unlabelled(batch_size=32)
    own = short(2, kept_views=160, learning_rate=1e-3, keep_best=True)
    config = CompressConfig(finetune=own, calibration_images=64, repair_views=1, log_every=1)
    whole = spvit.compress(host, found, "50%", output=tmp_path / "whole", config=config)

    def stop(phase: str, step: int, *_: object) -> None:
        if (phase, step) == ("finetune", 7):
            raise RunStoppedError("stopped", 15)

    often = replace(config, save_minutes=1e-9)
    with pytest.raises(RunStoppedError):
        spvit.compress(host, found, "50%", output=tmp_path / "parts", config=often, report=stop)
    monkeypatch.setattr("spvit.train.compress.fastest_precision", lambda _: "of another machine")
    parts = spvit.compress(host, found, "50%", output=tmp_path / "parts", config=often, resume=True)
    assert states_equal(whole, parts)
    lines = [json.loads(line) for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    kept = [(line["views"], line["precision"]) for line in lines if line["event"] == "kept_views"]
    assert kept == [(160, precision)]
    assert [line["step"] for line in lines if line["event"] == "step"] == list(range(1, 11))  # five an epoch
