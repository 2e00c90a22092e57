"""The recipes: a file for every published row, its figures, and each shrunk and stepped twice through the command."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

import spvit
from command import RECIPES, TINY, measure_briefly
from published_files import unfolded_params
from spvit.architecture import dense
from spvit.budget import human
from spvit.checkpoint import Preprocessing
from spvit.cli.main import main, parse
from spvit.cli.parser import DEMO
from spvit.replacements.costs import network_costs
from spvit.train.data import load_images, mixup_of
from spvit.zoo import architectures
from training import photographs

MEASURED = ("digits", "fashion_mnist")

# SPViT's published tables (method.md 6): top-1 and top-5 without and with distillation, params, FLOPs; and what the
# published architecture comes to when counted: deployed params and MACs, in millions and billions.
PUBLISHED = {
    "deit_tiny_1.0g": ("SPViT-DeiT-Ti", (70.7, 90.3), (73.2, 91.4), "4.9M", "1.0G", 4.775, 1.0386, 20, 10),
    "deit_small_3.3g": ("SPViT-DeiT-S", (78.3, 94.3), (80.3, 95.1), "16.4M", "3.3G", 15.871, 3.3532, 3, 10),
    "deit_base_8.3g": ("SPViT-DeiT-B", (81.5, 95.7), (82.4, 96.1), "46.2M", "8.3G", 41.584, 8.4091, 0.08, 10),
    "swin_tiny_3.3g": ("SPViT-Swin-Ti", (80.1, 94.9), (81.0, 95.3), "26.3M", "3.3G", 26.232, 3.3304, 2.8, 12),
    "swin_small_6.1g": ("SPViT-Swin-S", (82.4, 96.0), (83.0, 96.4), "39.2M", "6.1G", 38.922, 6.1376, 0.4, 14),
}
PUBLISHED_RECIPES = [name + end for name in PUBLISHED for end in ("", "_distilled")]


def recipe(name: str) -> Path:
    return DEMO if name == "digits" else RECIPES / f"{name}.yaml"


def expected(name: str) -> dict[str, Any]:
    """Return the expected figures that stand in a recipe's comments."""
    lines = recipe(name).read_text(encoding="utf-8").splitlines()
    start = lines.index("# expected:") + 1
    kept = []
    for line in lines[start:]:
        if not line.startswith("#   "):
            break
        kept.append(line.removeprefix("#   "))
    return yaml.safe_load("\n".join(kept))


@cache
def options_of(name: str, *more: str) -> Any:
    return parse(["compress", "--recipe", str(recipe(name)), *more])[1]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(photographs(tmp_path_factory.mktemp("photographs")))


def test_every_published_row_has_its_recipe() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*PUBLISHED_RECIPES, "fashion_mnist"}


@pytest.mark.parametrize("name", PUBLISHED_RECIPES)
def test_expected_figures_are_the_published_ones(name: str) -> None:
    row, plain, distilled, params, flops, *_ = PUBLISHED[name.removesuffix("_distilled")]
    starred = name.endswith("_distilled")
    figures = expected(name)
    assert figures["row"] == row + "*" * starred
    assert (figures["top1"], figures["top5"]) == (distilled if starred else plain)
    assert (figures["params"], figures["macs"]) == (params, flops)
    assert "2111.11802" in figures["source"]
    assert figures["measured_with_spvit"] is False


@pytest.mark.parametrize("name", PUBLISHED)
def test_budget_and_its_weight_are_those_of_the_published_architecture(name: str) -> None:
    *_, params, macs, weight, _ = PUBLISHED[name]
    figures, options = expected(name), options_of(name)
    assert figures["deployed_params"] / 1e6 == pytest.approx(params, abs=0.0011)
    assert figures["deployed_macs"] / 1e9 == pytest.approx(macs, rel=1e-4)
    with torch.device("meta"):
        host = timm.create_model(options.model, **options.model_args)
    costs = network_costs(host)
    architecture = architectures()[figures["architecture"]]
    assert costs["macs"].of(architecture) == figures["deployed_macs"]
    assert costs["params"].of(architecture) == figures["deployed_params"]
    if name != "deit_small_3.3g":  # its published 16.4M is not what its published architecture has
        assert f"{unfolded_params(host, architecture) / 1e6:.1f}M" == figures["params"]
    assert options.budget().target(costs["macs"]) == pytest.approx(figures["deployed_macs"], rel=1e-4)
    assert figures["published_lambda"] == weight
    assert options.search.budget_weight == pytest.approx(weight * (costs["macs"].dense / 1e9) ** 2, rel=1e-3)
    assert human(costs["macs"].dense) != human(figures["deployed_macs"])


@pytest.mark.parametrize("name", PUBLISHED_RECIPES)
def test_settings_are_the_published_ones(name: str) -> None:
    options, starred, swin = options_of(name), name.endswith("_distilled"), name.startswith("swin")
    search, finetune, images = options.search, options.finetune, options.images
    base = name.removesuffix("_distilled")
    assert (options.initialise, options.repair, options.multiple, options.epochs) == ("host", False, 1, None)
    assert search.epochs == PUBLISHED[base][-1]
    assert search.budget_warmup == 0
    assert finetune.epochs == (200 if starred else 130)
    teaching = (finetune.distillation, finetune.distillation_kind, finetune.teacher)
    assert teaching == ((0.5, "hard", "regnety_160.deit_in1k") if starred else (0.0, "soft", None))
    assert (search.distillation, search.teacher) == (0.0, None)
    assert (search.gate_logit, search.temperature) == (1.5, 100.0 if swin else 0.01)
    # at 1,024 images a step, twice the rate for 512: Swin's gates too, DeiT's as they are
    assert search.gate_learning_rate == (5e-4 if base == "deit_small_3.3g" else 1e-3)
    for phase in (search, finetune):
        assert (phase.learning_rate, phase.reference_batch) == (5e-5, 512)
        assert (phase.weight_decay, phase.label_smoothing, phase.warmup_epochs) == (0.05, 0.1, 0)
        assert phase.clip_gradient == (5.0 if swin else 0.0)
        assert (phase.averaging_epochs, phase.keep_best) == (0.0, False)
    assert finetune.minimum_learning_rate * 1024 / 512 == pytest.approx(1e-5)
    assert images.batch_size == (256 if base == "deit_tiny_1.0g" else 128)
    assert images.repeated_augmentation == (0 if swin else 3)
    drop_path = {"swin_tiny_3.3g": 0.2, "swin_small_6.1g": 0.3}.get(base, 0.1)
    assert options.model_args == {"drop_path_rate": drop_path}
    augmentation = (images.auto_augment, images.color_jitter, images.random_erasing, images.mixup, images.cutmix)
    assert augmentation == ("rand-m9-mstd0.5-inc1", 0.4, 0.25, 0.8, 1.0)
    assert (images.crop_scale, images.crop) == ((0.08, 1.0), 0.875)


def test_augmentation_of_imagenet_is_assembled_from_timm(pictures: str) -> None:
    options = options_of("deit_tiny_1.0g", "--data", pictures, "--images.batch_size", "4")
    images = load_images(options.data, options.images, (3, 32, 32), Preprocessing())
    parts = [type(part).__name__ for part in images.train.transform.transforms]
    assert parts[0] == "RandomResizedCropAndInterpolation"
    assert {"RandAugment", "RandomErasing", "RandomHorizontalFlip"} <= set(parts)
    assert [type(part).__name__ for part in images.validation.transform.transforms][:2] == ["Resize", "CenterCrop"]
    mixup = mixup_of(options.images, 2, 0.1)
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.label_smoothing) == (0.8, 1.0, 0.1)


def tiny(name: str, pictures: str, folder: Path) -> list[str]:
    """Return the options that shrink a recipe to two steps a phase, its model with weights from a file."""
    kind = name.split("_")[0]
    options = options_of(name)
    arguments = {"num_classes": 2, **options.model_args, **TINY[kind]}
    short = ["--search.epochs", "1", "--finetune.epochs", "1", "--log_every", "1", "--macs", "70%"]
    words = ["--model_args", json.dumps(arguments), "--output", str(folder / "run"), *short]
    if kind == "digits":
        return [*words, "--dense.epochs", "1", "--images.batch_size", "700", "--calibration_images", "300"]
    words += ["--data", pictures, "--images.batch_size", "4", "--images.workers", "0", "--calibration_images", "8"]
    if kind == "fashion":
        return [*words, "--dense.epochs", "1"]
    torch.manual_seed(0)
    torch.save(timm.create_model(options.model, **arguments).state_dict(), folder / "weights.pth")
    words += ["--checkpoint", str(folder / "weights.pth")]
    if options.finetune.teacher is None:
        return words
    teacher = timm.create_model("test_vit", img_size=48, num_classes=2)
    spvit.save(teacher, folder / "teacher", preprocessing=Preprocessing((0.5,) * 3, (0.5,) * 3))
    return [*words, "--finetune.teacher", str(folder / "teacher")]


@pytest.mark.parametrize(
    "name",
    [MEASURED[0], *(pytest.param(name, marks=pytest.mark.slow) for name in (*MEASURED[1:], *PUBLISHED_RECIPES))],
)
def test_recipe_is_stepped_twice(capsys, monkeypatch, tmp_path: Path, pictures: str, name: str) -> None:
    measure_briefly(monkeypatch)
    words = tiny(name, pictures, tmp_path)
    code = main(["compress", "--recipe", str(recipe(name)), *words])
    assert (code, capsys.readouterr().err) == (0, "")
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    phases = ["dense"] * (name in MEASURED) + ["search", "finetune"]
    for phase in phases:
        assert [line["step"] for line in steps if line["phase"] == phase and line["event"] == "step"] == [1, 2]
    settings, kept = options_of(name), yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["images"]["auto_augment"] == settings.images.auto_augment
    assert kept["finetune"]["learning_rate"] == settings.finetune.learning_rate
    assert spvit.surgery.pruned_record(spvit.load(tmp_path / "run")).folded


def test_drop_path_is_the_same_in_the_searched_and_the_pruned_network() -> None:
    from timm.layers import DropPath

    host = timm.create_model("deit_tiny_patch16_224", **{**TINY["deit"], "drop_path_rate": 0.1, "num_classes": 2})
    rates = [[part.drop_prob for part in net.modules() if isinstance(part, DropPath)]
             for net in (host, spvit.make_searchable(host), spvit.prune(host, dense([96, 96])))]  # fmt: skip
    assert rates[0] == rates[1] == rates[2]
    assert max(rates[0]) == pytest.approx(0.1)


def test_the_demonstration_is_the_digits_recipe() -> None:
    name, demo = parse(["demo"])
    assert (name, demo.output, demo.seed) == ("demo", "runs/demo", 0)
    assert asdict(demo) == asdict(options_of("digits"))
    changed = parse(["demo", "--output", "out", "--macs", "30%", "--seed", "1"])[1]
    assert changed == replace(demo, output="out", macs="30%", seed=1)


@pytest.mark.parametrize("name", MEASURED)
def test_figures_measured_with_spvit_say_how(name: str) -> None:
    figures = expected(name)
    assert figures["measured_with_spvit"] is True
    assert 50 < figures["top1"] <= 100
    assert "seed 0" in figures["source"]
    assert figures["deployed_macs"] == pytest.approx(0.5 * figures["dense_macs"], rel=0.006)
