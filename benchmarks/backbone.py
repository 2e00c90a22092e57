"""How much of a real backbone's features is kept when nothing is trained: cosines on crops of other photographs.

python benchmarks/backbone.py --images FOLDER [--model NAME] [--weights FILE] [--budgets 50% 25%] [--json FILE]
                              [--objectives pooled tokens features]

Photographs, not crops, are split into calibration and test, anew by every seed. A centred cosine is that of features
less the dense network's mean feature; it tells more, as all features of one network look alike. `neighbours` is the
share of a test crop's ten nearest, by class token, that are the dense network's ten. Without --weights timm downloads
the pretrained ones.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, cast

import timm
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.transforms import functional

import spvit
from reporting import check_free, machine, write_results
from spvit.repair.objective import OBJECTIVES
from spvit.replacements import targets

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SHORTER_SIDE = 640
CROPS = (160, 448)
"""Pixels of the smallest and the largest crop of a photograph whose shorter side is 640; resized to --size."""
TEST_SHARE, TEST_CROPS = 0.25, 240
NEAREST = 10
BATCH = 64
FIGURES = ("class", "class_centred", "patch", "patch_centred", "neighbours")


def load_model(options: argparse.Namespace) -> nn.Module:
    """Return the backbone without a head; timm resamples the position embedding to the size."""
    own = {} if options.weights is None else {"pretrained_cfg_overlay": {"file": options.weights}}
    model = timm.create_model(options.model, pretrained=True, num_classes=0, img_size=options.size, **own)
    if not getattr(model, "has_class_token", False):
        sys.exit(f"{options.model} has no class token; name a timm ViT that has one with --model")
    return cast(nn.Module, model.eval().to(options.device))


def load_photographs(folder: str) -> list[Image.Image]:
    """Return the photographs of a folder and its folders, in order of their names, shrunk."""
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(files) < 4:
        sys.exit(f"{folder} holds {len(files)} photographs, expected 4 or more (some dozens are better)")
    photographs = []
    for file in files:
        with Image.open(file) as opened:
            photograph = opened.convert("RGB")
        factor = SHORTER_SIDE / min(photograph.size)
        photographs.append(
            photograph.resize([round(factor * side) for side in photograph.size], Image.Resampling.BICUBIC)
        )
    return photographs


def crops(photographs: Sequence[Image.Image], count: int, size: int, seed: int, normal: dict[str, Any]) -> Tensor:
    """Return random crops of all photographs in turn, half of them mirrored: [count, 3, size, size]."""
    generator, found = random.Random(seed), []
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        side = generator.randint(*CROPS)
        left, top = (generator.randint(0, length - side) for length in photograph.size)
        crop = photograph.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        tensor = functional.to_tensor(crop)
        found.append(tensor.flip(2) if generator.random() < 0.5 else tensor)
    return cast(Tensor, functional.normalize(torch.stack(found), normal["mean"], normal["std"]))


@torch.inference_mode()
def features(model: Any, images: Tensor) -> Tensor:
    """Return the tokens after the last norm, [B, N, D]."""
    return torch.cat([model.forward_features(batch) for batch in images.split(BATCH)])


def agreement(found: Tensor, dense: Tensor, prefix: int) -> dict[str, float]:
    """Return the figures of features [B, N, D] against those of the dense network."""
    figures = {}
    for name, tokens in (("class", slice(0, 1)), ("patch", slice(prefix, None))):
        own, wanted = (side[:, tokens].flatten(0, 1) for side in (found, dense))
        centre = wanted.mean(0)
        figures[name] = float(torch.cosine_similarity(own, wanted).mean())
        figures[f"{name}_centred"] = float(torch.cosine_similarity(own - centre, wanted - centre).mean())
    near = [nearest(side[:, 0]) for side in (found, dense)]
    figures["neighbours"] = float((near[0][:, :, None] == near[1][:, None]).any(2).float().mean())
    return figures


def nearest(vectors: Tensor) -> Tensor:
    """Return the indices of each vector's nearest others by cosine, [B, 10]."""
    normed = nn.functional.normalize(vectors)
    return (normed @ normed.T).fill_diagonal_(-torch.inf).topk(NEAREST).indices


def timed(run: Any, device: str) -> tuple[Any, float]:
    """Return what a call returns and the seconds that it took, on an accelerator too."""
    started = time.perf_counter()
    result = run()
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()
    return result, time.perf_counter() - started


def measure(model: nn.Module, photographs: Sequence[Image.Image], seed: int, options: argparse.Namespace) -> list[Any]:
    """Return a row for every objective, budget and target of one split of the photographs."""
    normal = timm.data.resolve_model_data_config(model)
    shuffled = random.Random(seed).sample(photographs, len(photographs))
    tested = max(1, round(TEST_SHARE * len(shuffled)))
    calibration = crops(shuffled[tested:], options.count, options.size, seed, normal).to(options.device)
    test = crops(shuffled[:tested], TEST_CROPS, options.size, seed + 50, normal).to(options.device)
    dense, dense_macs = features(model, test), spvit.cost(model)["macs"]
    rows = []
    for objective in options.objectives:
        scores, score_seconds = timed(
            lambda asked=objective: spvit.score(model, calibration, objective=asked), options.device
        )
        for budget, stream in product(options.budgets, options.streams):
            try:
                architecture = spvit.decide(model, macs=budget, scores=scores)
            except spvit.BudgetError as error:
                print(f"{budget}: {error}", file=sys.stderr)
                continue
            targets.STREAM = stream
            pruned, seconds = timed(
                lambda kept=architecture: spvit.prune(model, kept, repair=calibration), options.device
            )
            row = {"seed": seed, "budget": budget, "objective": scores.objective, "stream": stream}
            row |= {"score_s": score_seconds, "repair_s": seconds}
            row["share"] = spvit.cost(model, architecture)["macs"] / dense_macs
            rows.append(row | agreement(features(pruned.eval(), test), dense, cast(Any, model).num_prefix_tokens))
    return rows


def table_of(rows: list[dict[str, Any]], options: argparse.Namespace) -> Table:
    """Return the means over seeds as a table."""
    title = f"{options.model}, {options.size} px, {options.count} images, {options.seeds} seeds, nothing trained"
    columns = ("budget", "objective", "stream", *FIGURES, "score_s", "repair_s")
    table = Table(title=title)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    variants = dict.fromkeys(tuple(row[name] for name in columns[:3]) for row in rows)
    for budget, objective, stream in variants:
        same = [row for row in rows if (row["budget"], row["objective"], row["stream"]) == (budget, objective, stream)]
        means = {name: mean(row[name] for row in same) for name in columns[3:]}
        seconds = [f"{means[name]:.1f}" for name in columns[-2:]]
        table.add_row(budget, objective, f"{stream:g}", *(f"{means[name]:.3f}" for name in FIGURES), *seconds)
    return table


def parse_options() -> argparse.Namespace:
    """Return the command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch14_dinov2", help="a timm ViT (default: %(default)s)")
    parser.add_argument("--weights", help="safetensors file for it (default: timm's pretrained weights)")
    parser.add_argument("--images", required=True, help="folder of photographs")
    parser.add_argument("--size", type=int, default=98, help="pixels of the sides of crops (default: %(default)s)")
    parser.add_argument("--count", type=int, default=800, help="calibration crops (default: %(default)s)")
    parser.add_argument("--budgets", nargs="+", default=["75%", "50%", "35%", "25%"], help="of the MACs")
    parser.add_argument("--seeds", type=int, default=3, help="splits of the photographs (default: %(default)s)")
    parser.add_argument(
        "--streams",
        nargs="+",
        type=float,
        default=[targets.STREAM],
        help="shares of what brings the residual stream back in a layer's target (default: that of spvit)",
    )
    parser.add_argument(
        "--objectives", nargs="+", default=["auto"], choices=OBJECTIVES, help="what scores count (default: auto)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--json", help="file to write the rows to, after every seed")
    return parser.parse_args()


def main() -> None:
    """Measure every split, print the means, and write the rows."""
    options = parse_options()
    check_free(options.json)
    model, photographs = load_model(options), load_photographs(options.images)
    settings = {**vars(options), "photographs": len(photographs), "test_crops": TEST_CROPS}
    rows: list[dict[str, Any]] = []
    for seed in range(1, options.seeds + 1):
        rows += measure(model, photographs, seed, options)
        write_results(options.json, "backbone", rows, anew=True, settings=settings)
    console = Console(width=120)
    console.print(table_of(rows, options))
    console.print(
        f"{len(photographs)} photographs; {machine()['processor' if options.device == 'cpu' else 'accelerator']}"
    )


if __name__ == "__main__":
    main()
