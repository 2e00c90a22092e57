"""What eight budgets take in one frontier, what one takes, and what `compress` takes for one: seconds, by process.

python benchmarks/frontier.py --host FOLDER --data digits [--threads 1] [--json FILE]
python benchmarks/frontier.py --photographs FOLDER [--weights FILE] [--size 98] [--crops 256] [--json FILE]

The host is a folder that spvit wrote (`spvit demo` leaves one in dense/), or DINOv2-S on crops of photographs, three
quarters of which are for training views. Both frontiers repair on as many views, evaluate, measure latency, write and
plot; `compress`, which trains nothing here, repairs on four times as many, as it does by default.
Read the clock where there is a GPU, which is used, and elsewhere the seconds of the processor.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.data import TensorDataset

import spvit
from backbone import crops, load_model, load_photographs
from reporting import check_free, figures_of_process, machine, peak_bytes, write_results
from spvit.train.data import load_images
from spvit.train.figures import quality_of, said

EIGHT = ("90%", "75%", "60%", "50%", "40%", "35%", "25%", "15%")
SIDES = {"eight": EIGHT, "one": EIGHT[3:4], "compress": EIGHT[3:4]}


def subject(options: argparse.Namespace) -> tuple[nn.Module, spvit.Images, int]:
    """Return the host, its images and how many calibration images there are."""
    if options.host is not None:
        host, about = spvit.load(options.host), spvit.describe(options.host)
        assert about.preprocessing is not None
        assert about.input_size is not None
        images = load_images(options.data, spvit.ImageConfig(flip=0.0), about.input_size, about.preprocessing)
        return host, images, 1024
    host, found = load_model(options), load_photographs(options.photographs)
    normal: dict[str, Any] = timm.data.resolve_model_data_config(host)
    cut = len(found) // 4
    sets = [
        TensorDataset(crops(some, count, options.size, seed, normal), torch.zeros(count, dtype=torch.long))
        for seed, (some, count) in enumerate(((found[cut:], options.crops), (found[:cut], options.crops // 4)))
    ]
    preprocessing = spvit.Preprocessing(normal["mean"], normal["std"])
    return host, spvit.Images(sets[0], sets[0], sets[1], (), preprocessing, spvit.ImageConfig()), options.crops


def main() -> None:
    """Run every side in turn, print the seconds and the ratios, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", help="folder of a dense model that spvit wrote")
    parser.add_argument("--data", default="digits", help="its images (default: %(default)s)")
    parser.add_argument("--photographs", help="folder of photographs, for DINOv2-S in place of --host")
    parser.add_argument("--model", default="vit_small_patch14_dinov2", help="a timm ViT (default: %(default)s)")
    parser.add_argument("--weights", help="safetensors file for it (default: timm's pretrained weights)")
    parser.add_argument("--size", type=int, default=98, help="pixels of the sides of crops (default: %(default)s)")
    parser.add_argument("--crops", type=int, default=256, help="calibration crops (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the processor (default: %(default)s)")
    parser.add_argument("--repair-views", type=int, default=1, help="of each calibration image (default: %(default)s)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--json", help="file to write the rows to")
    options = parser.parse_args()
    options.device = "cpu"
    if (options.host is None) == (options.photographs is None):
        parser.error("name a model with --host, or a folder with --photographs")
    check_free(options.json)
    if options.side is not None:
        print(json.dumps(measured(options)))
        return
    rows = [{"side": side, **figures_of_process([*sys.argv, "--side", side], {})} for side in SIDES]
    for row in rows:
        scores = f", of which scores {row['scores_s']:.1f}" if "scores_s" in row else ""
        print(f"{row['side']}: {row['cpu_s']:.1f} s of the processor; by the clock {row['clock_s']:.1f}{scores}")
        print(f"    {row['repair_views']} x {row['calibration_images']} views:", *row["points"], sep="  ")
    ratios = {}
    for row in rows[1:]:
        ratio, clock_ratio, held = (rows[0][name] / row[name] for name in ("cpu_s", "clock_s", "peak_bytes"))
        seconds = f"{ratio:.2f} of the processor's seconds, {clock_ratio:.2f} by the clock"
        print(f"eight / {row['side']}: {seconds}, {held:.2f} of the memory")
        ratios[row["side"]] = {"cpu": ratio, "clock": clock_ratio, "memory": held}
    print(machine())
    write_results(options.json, "frontier", rows, ratios=ratios)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of one side, and what it found."""
    torch.set_num_threads(options.threads)
    host, images, count = subject(options)
    alone = options.side == "compress"
    views = options.repair_views * (spvit.CompressConfig().repair_views if alone else 1)
    shared: dict[str, Any] = {"calibration_images": count, "repair_views": views}
    started, own = (time.process_time(), time.perf_counter()), {}
    with tempfile.TemporaryDirectory() as folder:
        if alone:
            [budget], config = SIDES[options.side], spvit.CompressConfig(epochs=0, **shared)
            spvit.compress(host, images, budget, output=folder, config=config)
            summary = json.loads((Path(folder) / "summary.json").read_text())
            name, value = quality_of(summary["pruned"])
            points = [f"{budget} {name} {said(name, value)}"]
        else:
            frontier = spvit.FrontierConfig(**shared)
            found = spvit.frontier(host, images, SIDES[options.side], output=folder, config=frontier)
            points = [f"{point.budget} {point.words}" for point in found.points]
            own["scores_s"] = found.seconds["scores"]
    own |= {"cpu_s": time.process_time() - started[0], "clock_s": time.perf_counter() - started[1]}
    return {**shared, **own, "peak_bytes": peak_bytes(), "points": points}


if __name__ == "__main__":
    main()
