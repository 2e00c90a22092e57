"""Top-1 on ImageNet before and after pruning, nothing trained, beside what other methods publish at the same MACs.

python benchmarks/imagenet.py --images IMAGENET [--models deit_base deit_small] [--count 1000] [--json FILE]

IMAGENET holds `train` and `validation` (or `val`), a folder a class. Calibration images come from `train`; their labels
are not used. "ffn 50%" removes as many MACs as half of all FFN units have, from FFNs alone; other budgets are shares of
the MACs. Models without a classifier, and SnapViT's figures, are judged by the 20 nearest of --gallery labelled
training images, by cosine. Published figures are of the dense networks that their authors had, whose accuracies differ
in the first decimal, and of their own calibration images. timm downloads the weights.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from typing import Any, cast

import timm
import torch
from rich.console import Console
from rich.table import Table
from timm.data import create_dataset, create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import spvit
from reporting import check_free, write_results
from spvit.hosts.host import Host, input_size
from spvit.replacements.costs import network_costs
from timm_vit import macs_of

NEAREST = 20


@dataclass(frozen=True)
class Case:
    """A model, a budget, and the top-1 that others publish for it, in percent."""

    model: str
    budget: str
    published: dict[str, float] = field(default_factory=dict)
    nearest: bool = False
    """Whether the nearest training images classify."""


VBP, CORP, SNAPVIT = "VBP (2507.12988)", "CORP (2602.05243)", "SnapViT (2510.17700)"
DEIT3, DINOV3 = "deit3_base_patch16_224.fb_in22k_ft_in1k", "vit_base_patch16_dinov3.lvd1689m"
SIGLIP2, SWIN = "vit_base_patch16_siglip_224.v2_webli", "swin_small_patch4_window7_224.ms_in1k"
CASES = (
    Case("deit_base_patch16_224.fb_in1k", "ffn 50%", {VBP: 66.40, CORP: 72.00, "DVBP + OB2C": 75.85}),
    Case("deit_small_patch16_224.fb_in1k", "ffn 50%", {CORP: 69.34}),
    # SnapViT's sizes: 35 % of the FFN units and 20 % of the heads go, or 55 % and 40 %.
    Case(DEIT3, "70%", {SNAPVIT: 76.68}, nearest=True),
    Case(DEIT3, "50%", {SNAPVIT: 49.92}, nearest=True),
    Case(DINOV3, "70%", {SNAPVIT: 36.79}, nearest=True),
    Case(DINOV3, "50%", {SNAPVIT: 16.55}, nearest=True),
    Case(SIGLIP2, "70%", {SNAPVIT: 24.41}, nearest=True),
    Case(SIGLIP2, "50%", {SNAPVIT: 7.76}, nearest=True),
    Case(SWIN, "70%"),
    Case(SWIN, "50%"),
)


def loaded(split: str, count: int | None, model: nn.Module, options: argparse.Namespace) -> DataLoader[Any]:
    """Return batches of (images, classes) of a split, or of `count` of its images drawn at random."""
    config = resolve_model_data_config(model) | {"input_size": input_size(model)}
    transform = create_transform(**config, is_training=False)
    images = create_dataset("", options.images, split=split, transform=transform)
    if count is not None:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed))
        images = Subset(images, order[:count].tolist())
    return DataLoader(images, options.batch, num_workers=options.workers)


@torch.inference_mode()
def outputs(model: nn.Module, batches: DataLoader[Any], options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return what a model makes of images, [B, ...] in float32, and their classes, [B]."""
    found = [(model(images.to(options.device)).float(), classes) for images, classes in batches]
    return torch.cat([output for output, _ in found]), torch.cat([classes for _, classes in found]).to(options.device)


def top1(model: nn.Module, nearest: bool, options: argparse.Namespace) -> float:
    """Return the percentage of validation images that a model classifies, or its nearest training images do."""
    if not nearest:
        logits, classes = outputs(model, loaded("validation", options.validation, model, options), options)
        return 100 * float((logits.argmax(1) == classes).float().mean())
    gallery, labels = outputs(model, loaded("train", options.gallery, model, options), options)
    found, classes = outputs(model, loaded("validation", options.validation, model, options), options)
    gallery = nn.functional.normalize(gallery)
    near = [(part @ gallery.T).topk(min(NEAREST, len(gallery))).indices for part in found.split(1024)]
    return 100 * float((labels[torch.cat(near)].mode(1).values == classes).float().mean())


def limits_of(model: nn.Module, budget: str) -> dict[str, Any]:
    """Return the arguments of `spvit.decide` for a budget."""
    if not budget.startswith("ffn "):
        return {"macs": budget}
    costs, share = network_costs(Host.of(model))["macs"], float(budget.removeprefix("ffn ").rstrip("%")) / 100
    removed = (1 - share) * sum(block.unit * block.units for block in costs.blocks)
    return {"macs": round(costs.dense - removed), "constraints": spvit.Constraints(only="ffn")}


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of one case."""
    headless: dict[str, Any] = {"num_classes": 0} if case.nearest else {}
    model = timm.create_model(case.model, pretrained=not options.no_pretrained, **headless, **options.model_args)
    model = cast(nn.Module, model.eval().to(options.device))
    batches = loaded("train", options.count, model, options)
    images = torch.cat([batch for batch, _ in batches]).to(options.device)
    scores = spvit.score(model, images, objective="pooled" if case.nearest else "auto")
    architecture = spvit.decide(model, scores=scores, **limits_of(model, case.budget))
    pruned = spvit.prune(model, architecture, repair=images).eval()
    row = {"model": case.model, "budget": case.budget, "judge": "nearest" if case.nearest else "classifier"}
    row["share"] = macs_of(pruned, images) / macs_of(model, images)
    row |= {"dense": top1(model, case.nearest, options), "pruned": top1(pruned, case.nearest, options)}
    return row | {"published": case.published}


def parse_options() -> argparse.Namespace:
    """Return the command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="ImageNet's folder, as timm reads it")
    parser.add_argument("--models", nargs="+", default=[""], help="beginnings of timm's names (default: all cases)")
    parser.add_argument("--count", type=int, default=1000, help="calibration images (default: %(default)s)")
    parser.add_argument(
        "--gallery", type=int, default=100_000, help="labelled images to be near (default: %(default)s)"
    )
    parser.add_argument("--validation", type=int, help="validation images, drawn at random (default: all)")
    parser.add_argument("--batch", type=int, default=128, help="images a batch (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=8, help="processes that read images (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="draws the images (default: %(default)s)")
    parser.add_argument("--json", help="file to write the rows to, after every case")
    parser.add_argument("--no-pretrained", action="store_true", help="random weights: to try the script")
    parser.add_argument("--model-args", nargs="*", default=[], help="NAME=INTEGER for timm, to try the script")
    options = parser.parse_args()
    options.model_args = {name: int(value) for name, value in (item.split("=") for item in options.model_args)}
    return options


def main() -> None:
    """Measure every case that is asked for, print them, and write the rows."""
    options = parse_options()
    check_free(options.json)
    cases = [case for case in CASES if case.model.startswith(tuple(options.models))]
    if not cases:
        sys.exit(f"no case is of {' '.join(options.models)}; there are {', '.join(sorted({c.model for c in CASES}))}")
    table = Table(title=f"ImageNet top-1, {options.count} calibration images, nothing trained")
    for column in ("model", "budget", "judge", "macs", "dense", "spvit", "published"):
        table.add_column(column)
    rows: list[dict[str, Any]] = []
    for case in cases:
        rows.append(measure(case, options))
        write_results(options.json, "imagenet", rows, anew=True, settings=vars(options))
        row, published = rows[-1], "\n".join(f"{name} {value:.2f}" for name, value in case.published.items())
        figures = (f"{row['share']:.1%}", f"{row['dense']:.2f}", f"{row['pruned']:.2f}")
        table.add_row(case.model, case.budget, row["judge"], *figures, published)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
