"""How much of a real backbone's features is kept, by spvit and its peers at equal MACs.

python benchmarks/backbone.py --images FOLDER [--model NAME] [--weights FILE] [--size 98] [--budgets 50% 25%]
                              [--methods spvit whitened-svd vbp corp] [--repair-views 1 4] [--cutouts FOLDER]
                              [--minutes 5] [--precision bf16] [--json FILE] [--plot FILE.svg]
python benchmarks/backbone.py --rows FILE.json [FILE.json ...] --plot FILE.svg

Photographs, not crops, are split into calibration and test, anew by every seed; every method gets the same crops, and
trains nothing. With --repair-views 4 spvit also repairs on four times as many crops of the same photographs, as `spvit
compress` does. With --minutes 5 it also distils for so long, trials of rates counted: on as many crops, less those of
an eighth of the photographs, which choose rate and weights, and on which it is not repaired either; --precision is that
of its steps. With --cutouts every second calibration crop has a picture of that folder pasted in, which has transparent
surroundings (such as Debian's tuxpaint-stamps-default), for more kinds of things than some dozen photographs show;
tests have none. MACs are those that torch counts on the pruned model. A centred cosine is that of features less the
dense network's mean feature; it tells more, as all features of one network look alike. `neighbours` is the
share of a test crop's ten nearest, by class token, that are the dense network's ten. Without --weights timm downloads
the pretrained ones. Peers are in backbone_peers.py; torch-pruning and plots need: pip install 'spvit[bench]'.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, cast

import timm
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset
from torchvision.transforms import functional

import spvit
from backbone_peers import METHODS, Pruning
from reporting import check_free, write_results
from spvit.repair.objective import OBJECTIVES
from timm_vit import macs_of

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SHORTER_SIDE = 640
CROPS = (160, 448)
"""Pixels of the smallest and the largest crop of a photograph whose shorter side is 640; resized to --size."""
TEST_SHARE, TEST_CROPS = 0.25, 240
HELD_SHARE, DISTILLED_BATCH = 1 / 8, 32
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


def load_cutouts(folder: str) -> list[Image.Image]:
    """Return the pictures with transparent surroundings of a folder and its folders, but for symbols, shrunk."""
    found = []
    for file in sorted(path for path in Path(folder).rglob("*.png") if "symbols" not in path.parts):
        with Image.open(file) as opened:
            if opened.mode in ("RGBA", "LA", "P"):
                found.append(opened.convert("RGBA"))
                found[-1].thumbnail((CROPS[0], CROPS[0]))
    return found


def crops(
    photographs: Sequence[Image.Image],
    count: int,
    size: int,
    seed: int,
    normal: dict[str, Any],
    cutouts: Sequence[Image.Image] = (),
) -> Tensor:
    """Return random crops of all photographs in turn, half of them mirrored: [count, 3, size, size].

    cutouts: pictures of which every second crop gets one, shuffled, whose longer side is 0.5 to 1.1 of its own.
    """
    generator, drawn = random.Random(seed), []
    cutouts = random.Random(seed).sample(cutouts, len(cutouts))
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        side = generator.randint(*CROPS)
        left, top = (generator.randint(0, length - side) for length in photograph.size)
        mirrored, pasted = generator.random() < 0.5, None
        if cutouts and index % 2:
            own = cutouts[index // 2 % len(cutouts)]
            scale = generator.uniform(0.5, 1.1) * size / max(own.size)
            shape = [max(1, round(scale * length)) for length in own.size]
            place = [generator.randint(*sorted((0, size - length))) for length in shape]
            pasted = own, shape, place
        drawn.append((photograph, (left, top, left + side, top + side), mirrored, pasted))

    def crop(photograph: Image.Image, box: tuple[int, ...], mirrored: bool, pasted: Any) -> Tensor:
        view = photograph.resize((size, size), Image.Resampling.BICUBIC, box)
        if pasted is not None:
            own = pasted[0].resize(pasted[1], Image.Resampling.BICUBIC)
            view.paste(own, tuple(pasted[2]), own)
        tensor = functional.to_tensor(view)
        return cast(Tensor, tensor.flip(2) if mirrored else tensor)

    with ThreadPoolExecutor() as pool:
        found = torch.stack(list(pool.map(crop, *zip(*drawn))))
    return cast(Tensor, functional.normalize(found, normal["mean"], normal["std"]))


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


def pruned(model: nn.Module, scores: spvit.Scores, images: Tensor, share: float) -> nn.Module:
    """Decide by scores, prune, and repair on images."""
    return spvit.prune(model, spvit.decide(model, macs=f"{share:.1%}", scores=scores), repair=images)


def distilled(
    model: nn.Module,
    scores: spvit.Scores,
    views: Tensor,
    photographs: int,
    minutes: float,
    precision: str,
    share: float,
) -> nn.Module:
    """Decide by scores, prune, repair, and distil without labels: compress as a user does.

    views: crops of so many photographs in turn.
    """
    held = max(1, round(HELD_SHARE * photographs))
    crops = TensorDataset(views.cpu(), torch.zeros(len(views), dtype=torch.long))
    train, validation = (
        Subset(crops, [place for place in range(len(views)) if (place % photographs < held) == chooses])
        for chooses in (False, True)
    )
    normal = timm.data.resolve_model_data_config(model)
    normalisation = spvit.Preprocessing(normal["mean"], normal["std"])
    batches = spvit.ImageConfig(batch_size=DISTILLED_BATCH)
    images = spvit.Images(train, train, validation, (), normalisation, batches)
    with tempfile.TemporaryDirectory() as folder:
        scores.save(folder)
        count = {"calibration_images": len(train), "repair_views": 1}
        more = {"precision": precision, "device": str(views.device)}
        config = spvit.CompressConfig(scores=folder, minutes=minutes, **more, **count)
        return spvit.compress(model, images, f"{share:.1%}", config=config, console=Console(stderr=True))


def methods_of(
    model: nn.Module, views: Tensor, photographs: int, options: argparse.Namespace
) -> Iterator[tuple[str, Pruning, float]]:
    """Yield every method with its function from a share of the MACs to a pruned model, and its seconds so far.

    The first of the views, crops of so many photographs in turn, are the calibration crops of all methods; what more
    there is only repairs, and distils.
    """
    images = views[: options.count]
    for method in options.methods:
        if method != "spvit":
            yield method, *timed(partial(METHODS[method], model, images), options.device)
            continue
        scores, seconds = timed(partial(spvit.score, model, images, objective=options.objective), options.device)
        for times in options.repair_views:
            name = method if times == 1 else f"{method}, {times} views"
            yield name, partial(pruned, model, scores, views[: times * options.count]), seconds
        if options.minutes is not None:
            name = f"{method}, {options.minutes:g} minutes"
            settings = photographs, options.minutes, options.precision
            yield name, partial(distilled, model, scores, views, *settings), seconds


def measure(
    model: nn.Module,
    photographs: Sequence[Image.Image],
    cutouts: Sequence[Image.Image],
    seed: int,
    options: argparse.Namespace,
) -> list[Any]:
    """Return a row for every method and budget of one split of the photographs."""
    normal = timm.data.resolve_model_data_config(model)
    shuffled = random.Random(seed).sample(photographs, len(photographs))
    tested = max(1, round(TEST_SHARE * len(shuffled)))
    count = options.count * max(options.repair_views)
    views = crops(shuffled[tested:], count, options.size, seed, normal, cutouts).to(options.device)
    test = crops(shuffled[:tested], TEST_CROPS, options.size, seed + 50, normal).to(options.device)
    dense, dense_macs = features(model, test), macs_of(model, test)
    rows = []
    for method, prune, score_seconds in methods_of(model, views, len(shuffled) - tested, options):
        for budget in options.budgets:
            try:
                small, seconds = timed(partial(prune, float(budget.rstrip("%")) / 100), options.device)
            except spvit.BudgetError as error:
                print(f"{method} {budget}: {error}", file=sys.stderr)
                continue
            row = {"seed": seed, "budget": budget, "method": method, "share": macs_of(small, test) / dense_macs}
            row |= {"score_s": score_seconds, "prune_s": seconds}
            rows.append(row | agreement(features(small.eval(), test), dense, cast(Any, model).num_prefix_tokens))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def means_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the means over seeds, a row for every budget and method."""
    means = []
    for budget, method in dict.fromkeys((row["budget"], row["method"]) for row in rows):
        same = [row for row in rows if (row["budget"], row["method"]) == (budget, method)]
        figures = {name: mean(row[name] for row in same) for name in ("share", *FIGURES, "score_s", "prune_s")}
        means.append({"budget": budget, "method": method, "seeds": len(same), **figures})
    return sorted(means, key=lambda row: -float(row["budget"].rstrip("%")))


def table_of(rows: list[dict[str, Any]], settings: dict[str, Any]) -> Table:
    """Return the means over seeds as a table."""
    model, size, count, seeds, photographs = (settings[n] for n in ("model", "size", "count", "seeds", "photographs"))
    table = Table(title=f"{model}, {size} px, {count} crops of {photographs} photographs, {seeds} splits")
    for column in ("budget", "method", "macs", *FIGURES, "score_s", "prune_s"):
        table.add_column(column.replace("_", " "), justify="left" if column == "method" else "right")
    budget = None
    for row in means_of(rows):
        if budget not in (None, row["budget"]):
            table.add_section()
        budget = row["budget"]
        seconds = [f"{row[name]:.1f}" for name in ("score_s", "prune_s")]
        figures = (f"{row[name]:.3f}" for name in FIGURES)
        table.add_row(budget, row["method"], f"{row['share']:.1%}", *figures, *seconds)
    return table


def plot(rows: list[dict[str, Any]], title: str, path: str) -> None:
    """Draw the centred cosines of class and patch tokens against the share of the MACs, a line a method."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    means = means_of(rows)
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "spvit", "font.size": 9}):
        figure, panels = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True, layout="constrained")
        for axes, token in zip(panels, ("class", "patch")):
            for index, method in enumerate(dict.fromkeys(row["method"] for row in means)):
                line = [(row["share"], row[f"{token}_centred"]) for row in means if row["method"] == method]
                axes.plot(*zip(*line), marker="os^Dv<>"[index % 7], markersize=4, label=method)
            axes.set(title=f"{token} token{'s' if token == 'patch' else ''}", xlabel="share of the dense MACs")
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("centred cosine to the dense features")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
        figure.suptitle(title)
        figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


def parse_options() -> argparse.Namespace:
    """Return the command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch14_dinov2", help="a timm ViT (default: %(default)s)")
    parser.add_argument("--weights", help="safetensors file for it (default: timm's pretrained weights)")
    parser.add_argument("--images", help="folder of photographs")
    parser.add_argument("--cutouts", help="folder of pictures to paste into every second calibration crop")
    parser.add_argument("--size", type=int, default=98, help="pixels of the sides of crops (default: %(default)s)")
    parser.add_argument("--count", type=int, default=800, help="calibration crops (default: %(default)s)")
    parser.add_argument("--budgets", nargs="+", default=["75%", "50%", "35%", "25%", "15%"], help="of the MACs")
    parser.add_argument("--methods", nargs="+", default=["spvit", *METHODS], choices=["spvit", *METHODS], help="which")
    parser.add_argument("--seeds", type=int, default=3, help="splits of the photographs (default: %(default)s)")
    parser.add_argument("--repair-views", nargs="+", type=int, default=[1], help="of spvit, in multiples of --count")
    parser.add_argument("--minutes", type=float, help="of distillation, for a row of its own (default: none)")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="of distillation")
    parser.add_argument("--objective", default="auto", choices=OBJECTIVES, help="what the scores of spvit count")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--json", help="file to write the rows to, after every seed")
    parser.add_argument("--plot", help="file to draw centred cosines against MACs to: .svg, .png; overwritten")
    parser.add_argument("--rows", nargs="+", help="what --json has written: print and draw it, and measure nothing")
    options = parser.parse_args()
    if (options.images is None) == (options.rows is None):
        parser.error("name a folder with --images, or a file with --rows")
    return options


def main() -> None:
    """Measure every split, print the means, and write the rows."""
    options = parse_options()
    if options.rows is None:
        rows, settings = measured(options)
    else:
        contents = [json.loads(Path(path).read_text(encoding="utf-8")) for path in options.rows]
        rows, settings = [row for content in contents for row in content["rows"]], contents[0]["settings"]
    Console(width=140).print(table_of(rows, settings))
    if options.plot is not None:
        plot(rows, f"{settings['model']}, {settings['size']} px", options.plot)


def measured(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure every split, write the rows, and return them and the settings."""
    check_free(options.json)
    model, photographs = load_model(options), load_photographs(options.images)
    cutouts = [] if options.cutouts is None else load_cutouts(options.cutouts)
    sizes = {"photographs": len(photographs), "cutouts_found": len(cutouts), "test_crops": TEST_CROPS}
    settings = {**vars(options), **sizes}
    rows: list[dict[str, Any]] = []
    for seed in range(1, options.seeds + 1):
        rows += measure(model, photographs, cutouts, seed, options)
        write_results(options.json, "backbone", rows, anew=True, settings=settings)
    return rows, settings


if __name__ == "__main__":
    main()
