"""Distillation: from any model, in its own normalisation and size, soft and hard, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import register_model
from torch import nn

import spvit
from spvit.checkpoint import Preprocessing
from spvit.errors import DataError, ModelError
from spvit.train.compress import CompressConfig
from spvit.train.loop import Phase, run_phase
from spvit.train.losses import distillation_loss, hard_distillation_loss
from spvit.train.teacher import Teacher, open_teacher
from training import compressed, digits, micro_host, run_in, short, short_search, states_equal

OTHER = Preprocessing((0.2,), (0.4,), crop=1.0)


def folder(root: Path, preprocessing: Preprocessing = OTHER, seed: int = 5, **more: object) -> str:
    """Write a micro model as a folder and return its name."""
    spvit.save(micro_host(seed, **more), root, preprocessing=preprocessing)
    return str(root)


@pytest.fixture
def convolutional(tmp_path: Path):
    """Register a timm model of no supported family, with weights in a file, and return its name."""
    classes = {"num_classes": 10, "in_chans": 1}
    torch.manual_seed(3)
    torch.save(timm.create_model("test_efficientnet", **classes).state_dict(), tmp_path / "weights.pth")
    source = {"file": str(tmp_path / "weights.pth"), "hf_hub_id": None, "url": "", "num_classes": 10}
    grey = {"input_size": (1, 160, 160), "mean": (0.2,), "std": (0.4,)}

    def classroom_net(pretrained: bool = False, **kwargs: object) -> nn.Module:
        return timm.create_model(
            "test_efficientnet", pretrained=pretrained, pretrained_cfg_overlay={**source, **grey}, **classes
        )

    names = sys.modules[__name__].__dict__.setdefault("__all__", [])
    if not timm.is_model("classroom_net"):
        register_model(classroom_net)
    names.clear()
    timm.models._registry._model_entrypoints["classroom_net"] = classroom_net
    return "classroom_net"


def test_teacher_gets_the_same_pixels_in_its_own_normalisation() -> None:
    seen: list[torch.Tensor] = []

    class Recorder(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images)
            return images.flatten(1)

    pixels = torch.rand(2, 3, 4, 4)
    student = Preprocessing((0.5, 0.4, 0.3), (0.5, 0.4, 0.3))
    own = Preprocessing((0.1, 0.2, 0.3), (0.9, 0.8, 0.7))

    def normalised(how: Preprocessing) -> torch.Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (how.mean, how.std))
        return (pixels - mean) / std

    Teacher(Recorder(), own, student)(normalised(student))
    assert seen[0] == pytest.approx(normalised(own), abs=1e-6)
    images = normalised(student)
    Teacher(Recorder(), student, student, size=(4, 4))(images)
    assert seen[1] is images
    Teacher(Recorder(), own, student, size=(6, 5))(images)
    assert seen[2].shape == (2, 3, 6, 5)


def test_folder_of_another_size_teaches(tmp_path: Path) -> None:
    images = digits()
    teacher = open_teacher(folder(tmp_path / "teacher", img_size=16), images)
    batch = torch.stack([images.validation[index][0] for index in range(4)])
    assert teacher(batch).shape == (4, 10)
    assert not teacher.training
    larger = nn.functional.interpolate(batch, (16, 16), mode="bicubic", antialias=True)
    pixels = larger * 0.5 + 0.5  # the student's mean and deviation are both 0.5
    expected = spvit.load(tmp_path / "teacher")((pixels - 0.2) / 0.4)
    assert torch.allclose(teacher(batch), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_timm_model_of_any_family_teaches_and_stays_as_it_is(tmp_path: Path, convolutional: str, kind: str) -> None:
    images = digits()
    batch = torch.stack([images.validation[index][0] for index in range(128)])
    before = open_teacher(convolutional, images)
    assert before.size is None
    guidance, student = before(batch), micro_host(seed=1)

    @torch.no_grad()
    def disagreement() -> float:
        logits = student.eval()(batch)
        return (
            hard_distillation_loss(logits, guidance) if kind == "hard" else distillation_loss(logits, guidance, 1.0)
        ).item()

    apart = disagreement()
    settings = short(2, distillation=1.0, distillation_kind=kind, teacher=convolutional)
    run_phase(Phase("finetune", student, settings), run_in(tmp_path, images))
    assert disagreement() < 0.95 * apart
    after = open_teacher(convolutional, images)
    assert states_equal(before, after)
    assert not any(parameter.requires_grad for parameter in after.parameters())


def test_hard_distillation_is_the_cross_entropy_with_the_teachers_first_guess() -> None:
    logits, guidance = torch.randn(6, 5), torch.randn(6, 5)
    chosen = torch.stack([logits.log_softmax(1)[row, guidance[row].argmax()] for row in range(6)])
    assert hard_distillation_loss(logits, guidance).item() == pytest.approx(-chosen.mean().item(), rel=1e-6)
    assert distillation_loss(logits, logits, 3.0).item() == pytest.approx(0, abs=1e-6)


def test_share_of_distillation_weighs_labels_against_the_teacher(tmp_path: Path) -> None:
    """At share 1/2 the loss of the first step is the mean of those at 0 and 1."""
    losses = []
    for share in (0.0, 0.5, 1.0):
        run = tmp_path / str(share)
        run.mkdir()
        named = {"teacher": folder(run / "teacher"), "distillation_kind": "hard"} if share else {}
        settings = short(1, distillation=share, **named)
        run_phase(Phase("finetune", micro_host(seed=1), settings), run_in(run, digits(), log_every=1))
        losses.append(float((run / "metrics.jsonl").read_text().split('"loss": ')[1].split(",")[0]))
    assert losses[1] == pytest.approx((losses[0] + losses[2]) / 2, rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-2)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ({"num_classes": 7}, DataError, r"has 7 classes, but the images have 10; name one of these classes"),
        ({"in_chans": 3}, DataError, r"takes 3 channels, but the model 1; name a teacher that takes the same"),
        ("regnety_16", ModelError, r"teacher: model 'regnety_16' is neither a timm model .*did you mean"),
    ],
)
def test_bad_teacher_is_refused_before_anything_is_trained(tmp_path: Path, name, error, words: str) -> None:
    if isinstance(name, dict):
        grey = OTHER if name.get("in_chans", 1) == 1 else Preprocessing()
        name = folder(tmp_path / "teacher", grey, **name)
    config = CompressConfig(search=short_search(1), finetune=short(1, distillation=0.5, teacher=name))
    with pytest.raises(error, match=words):
        compressed(micro_host(), "60%", config, tmp_path / "run", digits())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"distillation_kind": "firm"}, "distillation_kind is 'firm', expected soft or hard"),
        ({"teacher": "regnety_160"}, "the teacher is regnety_160, but distillation is 0; give its share"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_the_search(tmp_path: Path, settings: dict, words: str) -> None:
    config = CompressConfig(search=short_search(1), finetune=short(1, **settings))
    with pytest.raises(DataError, match=words):
        compressed(micro_host(), "60%", config, tmp_path / "run", digits())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
