"""How cost grows with images, model size and processes; and what the published rows cost on GPUs, computed.

python benchmarks/scale.py [--parts hours reading steps images layouts processes] [--json FILE]

All that is measured is seconds of one processor (one thread, random weights), which other jobs hardly change, not
wall time. `hours` measures nothing: it multiplies the steps of `recipes/` with the step times of ON_A_GPU.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch import nn

import spvit
from reporting import check_free, spread, write_results
from spvit.architecture import FFN, Architecture, Attention, Block
from spvit.hosts.host import macs_of_image
from spvit.replacements.costs import network_costs
from spvit.train.data import transforms
from spvit.train.settings import ImageConfig

ROOT = Path(__file__).parents[1]
MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "swin_tiny_patch4_window7_224")
BATCH, STEPS, LAYOUT_STEPS = 2, 3, 15
COUNTS = (256, 512, 1024)
"""Calibration images."""
PHOTOGRAPH = (500, 375)
"""Pixels, as of many of ImageNet's; the picture is scikit-learn's china.jpg."""
PROCESSES = ((1,), (2,), (2, "--shard"))
SMALL = '{"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 192, "depth": 12}'
IMAGENET, TEACHER_MACS = 1_281_167, 15.9e9
ON_A_GPU = {"macs_per_s": 94e12, "dense_ms_a_block": 35.4 / 12, "search_ms_a_block": 87.9 / 12}
"""One H100, bf16 autocast, eager (docs/benchmarks.md): a dense step of DeiT-B, 3 x 17.6G MACs x 64 images, in 36.0
ms; and what a step of DeiT-S takes at least, a block, as launches of small kernels bound it."""


def steps() -> list[dict[str, Any]]:
    """Return the seconds of an image in a dense step, a search step, and a step that the dense model teaches."""
    return [row for model in MODELS for row in _steps(model)]


def _steps(model: str) -> list[dict[str, Any]]:
    dense = timm.create_model(model)
    macs, rows = macs_of_image(dense), []
    for kind in ("dense", "search", "taught"):
        net: nn.Module = timm.create_model(model)
        net = spvit.make_searchable(net, inplace=True) if kind == "search" else net
        budget = spvit.BudgetLoss(net, macs="50%") if kind == "search" else None
        optimizer, seconds = torch.optim.AdamW(net.parameters()), []
        for _ in range(1 + STEPS):
            images, started = torch.randn(BATCH, 3, 224, 224), time.process_time()
            answers = net(images)
            loss = nn.functional.cross_entropy(answers, torch.zeros(BATCH, dtype=torch.long))
            if budget is not None:
                loss = loss + budget()
            if kind == "taught":
                with torch.no_grad():
                    wanted = dense(images)
                loss = loss + nn.functional.mse_loss(answers, wanted)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append((time.process_time() - started) / BATCH)
        middle, width = spread(seconds[1:])
        rows.append({"model": model, "step": kind, "macs": macs, "s_an_image": middle, "spread": width})
    return rows


def layouts() -> list[dict[str, Any]]:
    """Return the seconds of an image in a training step with images and weights as they are, and channels last.

    All attention has become 3 x 3 convolutions. The two take turns; the ratio is the median over these.
    """
    return [_layouts(model) for model in (MODELS[0], MODELS[3])]


def _layouts(model: str) -> dict[str, Any]:
    host = timm.create_model(model)
    blocks = tuple(Block(Attention("conv3"), FFN.whole(block.units)) for block in network_costs(host)["macs"].blocks)
    plain = spvit.fold(spvit.prune(host, Architecture(blocks, "identity", "mean")))
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    seconds: dict[str, list[float]] = {"plain": [], "channels_last": []}
    for number in range(1 + LAYOUT_STEPS):
        pictures = torch.randn(BATCH, 3, 224, 224)
        for name, net in {"plain": plain, "channels_last": last}.items():
            own = pictures.to(memory_format=torch.channels_last) if name == "channels_last" else pictures
            started = time.process_time()
            net(own).square().mean().backward()
            net.zero_grad()
            seconds[name] += [(time.process_time() - started) / BATCH] if number else []
    ratios = [own / other for own, other in zip(seconds["channels_last"], seconds["plain"])]
    return {"model": model, **{name: spread(own)[0] for name, own in seconds.items()}, "ratio": spread(ratios)[0]}


def images() -> list[dict[str, Any]]:
    """Return the seconds of scores, decision and repair by the number of calibration images: DeiT-Ti at 64 px."""
    rows = []
    for count in COUNTS:
        host, pictures = timm.create_model(MODELS[0], img_size=64).eval(), torch.randn(count, 3, 64, 64)
        started = [time.process_time()]
        scores = spvit.score(host, pictures)
        started.append(time.process_time())
        architecture = spvit.decide(host, macs="50%", scores=scores)
        started.append(time.process_time())
        spvit.prune(host, architecture, repair=pictures)
        started.append(time.process_time())
        parts = zip(("score_s", "decide_s", "repair_s"), itertools.pairwise(started))
        rows.append({"images": count, **{name: end - start for name, (start, end) in parts}})
    return rows


def reading() -> list[dict[str, Any]]:
    """Return the seconds of reading one photograph (JPEG) and augmenting it: as DeiT does, lightly, to evaluate."""
    [photograph, _] = load_sample_images().images
    settings = {"color_jitter": 0.4, "auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25}
    augmented, evaluated = transforms(ImageConfig(**settings), (3, 224, 224), spvit.Preprocessing())
    light, _ = transforms(ImageConfig(), (3, 224, 224), spvit.Preprocessing())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photograph.jpg"
        Image.fromarray(photograph).resize(PHOTOGRAPH).save(path, quality=92)
        for name, prepare in {"as DeiT": augmented, "crop and flip": light, "evaluation": evaluated}.items():
            seconds = []
            for _ in range(100):
                started = time.process_time()
                with Image.open(path) as image:
                    prepare(image.convert("RGB"))
                seconds.append(time.process_time() - started)
            middle, width = spread(seconds)
            rows.append({"augmentation": name, "ms": 1000 * middle, "spread_ms": 1000 * width})
    return rows


def processes() -> list[dict[str, Any]]:
    """Return the seconds of an epoch (11 steps of 128 digits, a ViT of 5.3M parameters), over all processes."""
    rows = []
    for count, *more in PROCESSES:
        seconds = {epochs: _trained(count, epochs, more) for epochs in (1, 3)}
        rows.append(
            {
                "processes": " ".join((str(count), *more)),
                "s_an_epoch": (seconds[3] - seconds[1]) / 2,
                "s_to_start": seconds[1],
            }
        )
    return rows


def _trained(count: int, epochs: int, more: Sequence[str]) -> float:
    """Return the processor seconds of a run, without those of the launcher's imports."""
    launcher = ["torch.distributed.run", "--nproc_per_node", str(count), "--master_port", "29677"] if count > 1 else []
    words = [
        "train",
        "--model",
        "vit_tiny_patch16_224",
        "--model-args",
        SMALL,
        "--pretrained",
        "false",
        "--device",
        "cpu",
    ]
    words += ["--data", "digits", "--images.mean", "[0.5]", "--images.std", "[0.5]"]
    words += ["--images.batch-size", str(128 // count), "--dense.epochs", str(epochs), *more]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", *launcher, *(["-m"] if launcher else []), "spvit_command", *words]
        own = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [*command, "--output", str(Path(folder) / "run")], check=True, env=own, stdout=subprocess.DEVNULL
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def hours() -> list[dict[str, Any]]:
    """Return the GPU hours that each published row takes, and how many images a second its GPU then wants to be fed."""
    rows = []
    for path in sorted((ROOT / "recipes").glob("*g*.yaml")):
        recipe = yaml.safe_load(path.read_text())
        if recipe["data"] != "imagenet":
            continue
        host, batch = timm.create_model(recipe["model"].partition(".")[0]), recipe["images"]["batch_size"]
        macs, blocks = macs_of_image(host), len(network_costs(host)["macs"].blocks)
        kept = _number(recipe["macs"]) / macs
        taught = TEACHER_MACS if "teacher" in recipe["finetune"] else 0.0
        per_step = {
            "search": _step_ms(3 * macs * batch, blocks * ON_A_GPU["search_ms_a_block"]),
            "finetune": _step_ms((3 * kept * macs + taught) * batch, blocks * ON_A_GPU["dense_ms_a_block"]),
        }
        row: dict[str, Any] = {"row": path.stem, "batch": batch}
        for phase, ms in per_step.items():
            row[f"{phase}_ms"] = ms
            row[f"{phase}_h"] = recipe[phase]["epochs"] * IMAGENET / batch * ms / 3.6e6
        row["hours"] = row["search_h"] + row["finetune_h"]
        row["images_per_s"] = 1000 * batch / per_step["finetune"]
        rows.append(row)
    return rows


def _step_ms(macs: float, least: float) -> float:
    return max(least, 1000 * macs / ON_A_GPU["macs_per_s"])


def _number(text: str) -> float:
    return float(text.removesuffix("G")) * 1e9


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "hours": hours,
    "reading": reading,
    "steps": steps,
    "images": images,
    "layouts": layouts,
    "processes": processes,
}


def main() -> None:
    """Measure the parts and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", help="file to write the figures to")
    options = parser.parse_args()
    check_free(options.json)
    torch.set_num_threads(1)
    console, found = Console(), []
    for part in options.parts:
        rows = PARTS[part]()
        table = Table(*rows[0], title=part)
        for row in rows:
            table.add_row(*(f"{cell:,.3g}" if isinstance(cell, float) else str(cell) for cell in row.values()))
        console.print(table)
        found += [{"part": part, **row} for row in rows]
    write_results(options.json, "scale", found)


if __name__ == "__main__":
    main()
