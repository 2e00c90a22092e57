"""Without labels: which images validate, what agreement is, and distillation that cannot harm."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import Subset

import spvit
from spvit.cli.main import main
from spvit.errors import DataError, RunStoppedError
from spvit.train.compress import halves
from spvit.train.data import Images
from spvit.train.figures import Agreement, Answering, Figures, Reference, figures_of, reference_of
from spvit.train.loop import Loop, Phase, Run, run_phase
from spvit.train.rate import _trial, with_rate
from spvit.train.run_folder import RunFolder
from spvit.train.settings import CompressConfig, ImageConfig, LoopConfig, PhaseConfig
from spvit.train.sources import find_images
from training import GREY, compressed, digits, image_folder, micro_host, short, states_equal


def unlabelled(**settings: object) -> Images:
    return replace(digits(**settings), classes=())


def pictures(root: Path, count: int) -> Path:
    """Write grey pictures of digits into a folder and one inside it."""
    images = digits()
    (root / "more").mkdir(parents=True)
    for index in range(count):
        grey = ((images.validation[index][0][0] * 0.5 + 0.5) * 255).byte().numpy()
        Image.fromarray(grey).save(root / ("more" if index % 2 else ".") / f"{index}.png")
    return root


def test_a_tenth_of_a_folder_without_labels_validates_the_same_in_every_run(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", 31)
    (folder / "notes.txt").write_text("not an image")
    train, validation, classes = find_images(str(folder), ImageConfig())
    assert (len(train), len(validation), classes) == (27, 4, ())
    assert {Path(path) for path, _ in [*train, *validation]} == set(folder.rglob("*.png"))
    assert list(find_images(str(folder), ImageConfig())[0]) == list(train)


def test_train_and_val_without_folders_for_classes_have_no_labels(tmp_path: Path) -> None:
    for part, count in (("train", 5), ("val", 2)):
        (tmp_path / part).mkdir()
        for index in range(count):
            Image.new("L", (8, 8), 20 * index).save(tmp_path / part / f"{index}.png")
    train, validation, classes = find_images(str(tmp_path), ImageConfig())
    assert ([Path(path).parent.name for path, _ in validation], len(train), classes) == (["val", "val"], 5, ())
    for path in (tmp_path / "val").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="5 images in train/ and 0 in val/, expected some in both"):
        find_images(str(tmp_path), ImageConfig())


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folders train/ and val/, and 0 images; expected both"):
        find_images(str(tmp_path), ImageConfig())


def _parts(model: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Return pooled output, class token and patches of a timm ViT without a head, naively."""
    tokens = model.forward_features(images)  # type: ignore[operator]
    return [model.forward_head(tokens), tokens[:, :1], tokens[:, 1:]]  # type: ignore[operator]


@pytest.mark.parametrize("batch", [128, 7])
def test_agreement_of_features_is_the_mean_centred_cosine(batch: int) -> None:
    images = unlabelled(batch_size=batch)
    images = replace(images, validation=torch.utils.data.Subset(images.validation, range(30)))
    dense, other = (micro_host(seed, num_classes=0).eval() for seed in (0, 1))
    stacked = torch.stack([images.validation[index][0] for index in range(30)])
    reference = reference_of(dense, images, LoopConfig())
    with torch.no_grad():
        wanted, found = _parts(dense, stacked), _parts(other, stacked)
        cosines, error = [], torch.zeros(())
        for part, own in zip(wanted, found):
            mean = part.flatten(0, -2).mean(0)
            cosines.append(F.cosine_similarity(own - mean, part - mean, dim=-1).mean())
            error += (own - part).square().mean() / (part - mean).square().mean() / 3
        [figures] = figures_of([other], images, LoopConfig(), reference)
        loss = reference.loss(Answering(other, reference)(stacked), reference.parts(stacked), PhaseConfig())
    assert isinstance(figures, Agreement)
    assert figures.images == 30
    assert figures.agreement == pytest.approx(float(torch.stack(cosines).mean()), abs=1e-5)
    assert float(loss) == pytest.approx(float(error), rel=1e-4)
    assert figures_of([dense], images, LoopConfig(), reference) == [Agreement(1.0, len(images.validation))]


def test_agreement_of_classifiers_is_the_share_of_equal_first_guesses() -> None:
    images = unlabelled()
    dense, other = (micro_host(seed).eval() for seed in (0, 1))
    stacked = torch.stack([images.validation[index][0] for index in range(360)])
    share = (dense(stacked).argmax(1) == other(stacked).argmax(1)).float().mean()
    [figures] = figures_of([other], images, LoopConfig(), reference_of(dense, images, LoopConfig()))
    assert 0 < figures.quality < 1
    assert figures.quality == pytest.approx(float(share))
    assert figures.words == f"agreement {float(share):.4f}"


def _run(folder: Path, images: Images, reference: Reference, **settings: float) -> Run:
    return Run(images, RunFolder(folder), LoopConfig(**settings), reference=reference)


@pytest.mark.parametrize("classes", [0, 10])
def test_distillation_without_labels_brings_a_model_nearer_to_the_dense_one(tmp_path: Path, classes: int) -> None:
    images, dense, model = unlabelled(), micro_host(0, num_classes=classes), micro_host(1, num_classes=classes)
    run = _run(tmp_path, images, reference_of(dense, images, LoopConfig()))
    [before] = figures_of([model], images, LoopConfig(), run.reference)
    phase = Phase("finetune", model, short(3, averaging_epochs=0.1, keep_best=True), teacher=dense)
    after = run_phase(phase, run)
    assert after.quality > before.quality + 0.05
    [found] = figures_of([model], images, LoopConfig(), run.reference)
    assert found == after  # the model is left with the weights of these figures
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["agreement"] for line in lines if line["event"] == "evaluation"][-1] <= after.quality
    assert all("agreement_loss" in line for line in lines if line["event"] == "step")


def test_distillation_that_harms_is_undone(tmp_path: Path) -> None:
    images, dense = unlabelled(), micro_host(num_classes=0)
    model = micro_host(num_classes=0)
    run = _run(tmp_path, images, reference_of(dense, images, LoopConfig()))
    harmful = short(1, learning_rate=0.5, keep_best=True)
    figures = run_phase(Phase("finetune", model, harmful, teacher=dense), run)
    assert figures.quality == pytest.approx(1, abs=1e-5)
    assert states_equal(model, dense)


def test_a_continued_run_without_labels_repeats_an_uninterrupted_one(tmp_path: Path) -> None:
    images, dense = unlabelled(), micro_host(num_classes=0)
    reference = reference_of(dense, images, LoopConfig())
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    models = [micro_host(1, num_classes=0) for _ in range(3)]
    settings = short(2, minimum_learning_rate=1e-3, warmup_epochs=0)
    whole = run_phase(Phase("finetune", models[0], settings), _run(tmp_path / "whole", images, reference))
    run_phase(Phase("finetune", models[1], replace(settings, epochs=1)), _run(tmp_path / "parts", images, reference))
    parts = run_phase(Phase("finetune", models[2], settings), _run(tmp_path / "parts", images, reference))
    assert parts == whole
    assert states_equal(models[0], models[2])


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (5e-5, [5e-5, 1.5e-4]),
        (5e-4, [5e-5, 1.5e-4, 5e-4]),
        (1.5e-5, [5e-5, 1.5e-5]),
        (5e-6, [5e-5, 1.5e-5, 5e-6]),
        (0.0, [5e-5, 1.5e-5, 5e-6]),
    ],
)
def test_the_rate_is_the_highest_that_a_short_trial_gains_by(tmp_path: Path, monkeypatch, best: float, tried) -> None:
    images, dense = unlabelled(), micro_host(num_classes=0)
    run = _run(tmp_path, images, reference_of(dense, images, LoopConfig()))
    rates = []

    def trial(phase: Phase, run: Run, rate: float, folder: RunFolder) -> tuple[bool, float, float]:
        rates.append(rate)
        return rate <= best, math.inf, 1280.0 if rate == max(best, 5e-6) else 1.0

    monkeypatch.setattr("spvit.train.rate._trial", trial)
    asked = Phase("finetune", dense, short(1, learning_rate=None))
    found = with_rate(asked, run, time.monotonic() - 30)
    assert (found.config.minimum_learning_rate, found.steps) == (0.0, None)
    assert (found.config.learning_rate, rates) == (max(best, 5e-6), tried)
    assert with_rate(asked, run).config == found.config  # as the run's folder says
    assert rates == tried
    for minutes, seconds in ((2.0, 0.9 * 120 - 30), (0.5, 0.9 * 30 / 2)):  # of which 30 were spent
        timed = with_rate(replace(asked, config=replace(asked.config, minutes=minutes)), run)
        assert timed.steps == pytest.approx(seconds * 1280 / run.images.config.batch_size, abs=3)
    given = Phase("finetune", dense, short(1, learning_rate=1e-2))
    assert with_rate(given, run) is given
    labelled = Run(digits(), RunFolder(tmp_path), LoopConfig())
    assert with_rate(asked, labelled) is asked


@pytest.mark.parametrize(
    ("epochs", "minutes", "error", "rate"),
    [
        (37, None, 1.3, 5e-4),  # of 11 steps
        (37, None, 1.5, 5e-5),
        (36, None, 1.3, 5e-5),  # too few steps
        (10_000, 1.0, 1.3, 5e-4),
        (10_000, 0.01, 1.3, 5e-5),
    ],
)
def test_a_rate_that_ends_somewhat_worse_is_borne_where_many_steps_follow(
    tmp_path: Path, monkeypatch, epochs: int, minutes: float | None, error: float, rate: float
) -> None:
    images, dense, model = unlabelled(batch_size=128), micro_host(num_classes=0), micro_host(1, num_classes=0)
    run = _run(tmp_path, images, reference_of(dense, images, LoopConfig()))
    monkeypatch.setattr("spvit.train.rate._trial", lambda _, __, tried, ___: (tried <= 5e-5, error, 12800.0))
    asked = Phase("finetune", model, short(epochs, learning_rate=None, minutes=minutes))
    assert with_rate(asked, run).config.learning_rate == rate


def test_a_trial_says_how_much_further_it_ends(tmp_path: Path, monkeypatch) -> None:
    images, dense, model = unlabelled(batch_size=16), micro_host(num_classes=0), micro_host(1, num_classes=0)
    run = _run(tmp_path, images, reference_of(dense, images, LoopConfig()))
    [start] = figures_of([model], images, LoopConfig(), run.reference)
    ends = []

    def phase_run(phase: Phase, run: Run) -> Figures:
        figures = run_phase(phase, run)
        ends.append(run.folder.recorded(phase.name, "evaluation")["agreement"])
        return figures

    monkeypatch.setattr("spvit.train.rate.run_phase", phase_run)
    folder = RunFolder(tmp_path / "trials")
    folder.path.mkdir()
    gains, further, _ = _trial(Phase("finetune", model, short(1)), run, 0.1, folder)
    assert not gains
    assert further == pytest.approx((1 - ends[0]) / (1 - start.quality), rel=1e-5)
    assert further > 1


def test_steps_that_minutes_have_room_for_end_a_phase_and_its_schedule(tmp_path: Path) -> None:
    images, dense, model = unlabelled(batch_size=128), micro_host(num_classes=0), micro_host(1, num_classes=0)
    run = _run(tmp_path, images, reference_of(dense, images, LoopConfig()), log_every=1)
    config = short(100, minutes=60.0, minimum_learning_rate=0.0, warmup_epochs=0)
    run_phase(Phase("finetune", model, config, steps=15), run)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if line["event"] == "step"]
    assert rates == pytest.approx([1e-3 * 0.5 * (1 + math.cos(math.pi * step / 15)) for step in range(15)])
    assert [line["epoch"] for line in lines if line["event"] == "evaluation"] == [1, 2]  # of 12 steps each
    again = run_phase(Phase("finetune", micro_host(1, num_classes=0), config, steps=15), run)
    assert again.quality == lines[-1]["agreement"]  # it has ended, and is not trained on


def test_weights_half_way_are_kept_where_they_are_the_best(tmp_path: Path, monkeypatch) -> None:
    images, dense, model = unlabelled(), micro_host(num_classes=0), micro_host(1, num_classes=0)

    def too_far(loop: Loop, epoch: int, start: int) -> None:
        loop.place = epoch, loop.steps
        with torch.no_grad():
            for own, wanted in zip(loop.phase.model.parameters(), dense.parameters()):
                own.copy_(2 * wanted - own)

    monkeypatch.setattr(Loop, "_epoch", too_far)
    monkeypatch.setattr(Loop, "reading", Mock(), raising=False)
    run = _run(tmp_path, images, reference_of(dense, images, LoopConfig()), save_minutes=1e-9)
    ends = {name: 2 * value - model.get_parameter(name) for name, value in dense.named_parameters()}
    figures = run_phase(Phase("finetune", model, short(1, keep_best=True)), run)
    assert figures.quality == pytest.approx(1, abs=1e-5)
    _, state = run.folder.read_state("finetune")
    for name, end in ends.items():
        torch.testing.assert_close(state[f"model.{name}"], end)  # of where it ended, not of half the way
    for own, wanted in zip(model.parameters(), dense.parameters()):
        torch.testing.assert_close(own, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_a_trial_trains_a_copy_and_leaves_nothing(tmp_path: Path) -> None:
    images, dense, model = unlabelled(batch_size=16), micro_host(num_classes=0), micro_host(1, num_classes=0)
    run, before = _run(tmp_path, images, reference_of(dense, images, LoopConfig())), micro_host(1, num_classes=0)
    config = short(1, learning_rate=None, distillation=0.5)
    assert with_rate(Phase("finetune", model, config, teacher=dense), run).config.learning_rate == 5e-4
    assert states_equal(model, before)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(("batch", "judges"), [(64, 64), (16, 96), (128, 128), (512, 360)])
def test_trials_are_judged_by_whole_batches_of_many_images(
    tmp_path: Path, monkeypatch, batch: int, judges: int
) -> None:
    images, dense, model = unlabelled(batch_size=batch), micro_host(num_classes=0), micro_host(1, num_classes=0)
    run = _run(tmp_path, images, reference_of(dense, images, LoopConfig()))
    monkeypatch.setattr("spvit.train.rate.VALIDATED", 100)
    judged = set()

    def phase_run(phase: Phase, run: Run) -> Figures:
        judged.add(len(run.images.validation))
        return run_phase(phase, run)

    monkeypatch.setattr("spvit.train.rate.run_phase", phase_run)
    assert with_rate(Phase("finetune", model, short(1, learning_rate=None)), run).config.learning_rate > 0
    assert judged == {judges}


def test_a_rate_that_overflows_gains_nothing(tmp_path: Path, monkeypatch) -> None:
    images, dense, model = unlabelled(batch_size=16), micro_host(num_classes=0), micro_host(1, num_classes=0)
    run = _run(tmp_path, images, reference_of(dense, images, LoopConfig()))
    monkeypatch.setattr("spvit.train.rate.RATES", (1e-3, 10.0))
    monkeypatch.setattr("spvit.train.loop.learning_rate_at", lambda *given: 1e30 if given[3] == 10.0 else 1e-3)
    monkeypatch.setattr("spvit.train.rate.FIRST", 1)
    assert with_rate(Phase("finetune", model, short(1, learning_rate=None)), run).config.learning_rate == 1e-3
    stop = Mock(side_effect=RunStoppedError("stopped", 15))
    monkeypatch.setattr("spvit.train.rate.run_phase", stop)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(RunStoppedError):
        with_rate(Phase("finetune", model, short(1, learning_rate=None)), run)


def test_halves_of_the_validation_images_choose_and_report() -> None:
    images = unlabelled()
    every = range(len(images.validation))
    for count in (1, 2, 7):
        chosen_by, reported = halves(replace(images, validation=Subset(images.validation, range(count))))
        places = [
            [part.dataset.indices[place] for place in part.indices]
            for part in (chosen_by.validation, reported.validation)
        ]
        assert places == ([[0], [0]] if count == 1 else [list(every[:count:2]), list(every[1:count:2])])


@pytest.mark.slow
def test_compress_of_a_backbone_repairs_distils_and_writes_agreement(tmp_path: Path) -> None:
    host = micro_host(num_classes=0)
    config = CompressConfig(calibration_images=256, repair_views=1, epochs=1)
    result = compressed(host, "50%", config, tmp_path, digits())  # the labels of the digits do not count
    assert result.dense.quality == pytest.approx(1, abs=1e-5)
    assert result.pruned.quality >= result.after_pruning.quality
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["pruned"] == {"agreement": result.pruned.quality, "images": 180}
    assert result.dense.images == result.after_pruning.images == 180  # the others chose among epochs
    assert spvit.describe(tmp_path).classes is None
    assert spvit.load(tmp_path)(torch.randn(2, 1, 8, 8)).shape == (2, 24)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dense": short(1)}, "dense.epochs is 1, but there are no labels to train by; leave it out"),
        ({"finetune": short(1, teacher="x", distillation=0.5)}, "finetune.teacher is named, but without labels"),
    ],
)
def test_what_needs_labels_is_refused_without(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        compressed(micro_host(), "50%", CompressConfig(**settings), tmp_path, unlabelled())


@pytest.mark.slow
def test_the_command_compresses_a_backbone_by_a_folder_of_pictures(tmp_path: Path, capsys) -> None:
    folder, host, output = pictures(tmp_path / "pictures", 120), str(tmp_path / "host"), str(tmp_path / "run")
    spvit.save(micro_host(num_classes=0), host, preprocessing=GREY)
    small = ["--calibration-images", "96", "--repair-views", "2", "--images.batch-size", "32", "--macs", "60%"]
    common = ["--model", host, "--data", str(folder)]
    assert main(["compress", *common, *small, "--epochs", "1", "--output", output]) == 0
    said = capsys.readouterr().out
    assert "no labels: judged by agreement with it" in said
    assert "right after pruning agreement 0." in said
    page = (Path(output) / "report.html").read_text()
    assert "agreement with the dense one is " in page
    assert 'id="agreement-finetune"' in page
    assert "Not on this page" not in page
    assert main(["compress", *common, *small, "--dry-run", "--output", str(tmp_path / "plan")]) == 0
    assert main(["evaluate", *common]) == 2
    assert "has no labels, but this command needs several classes" in capsys.readouterr().err


def test_a_single_class_is_no_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        pictures(tmp_path / "data" / part / "all", 4)
    words = ["--model", "vit_tiny_patch16_224", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "run")]
    assert main(["train", *words]) == 2
    assert "has a single class, but this command needs several classes" in capsys.readouterr().err


def test_a_labelled_folder_still_has_its_classes(tmp_path: Path) -> None:
    assert find_images(str(image_folder(tmp_path)), ImageConfig())[2] == ("cat", "dog")
