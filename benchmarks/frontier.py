"""What eight budgets take in one frontier, and what one budget takes: seconds of the processor, both sides.

python benchmarks/frontier.py --host FOLDER --data digits [--threads 1] [--json FILE]
python benchmarks/frontier.py --photographs FOLDER [--weights FILE] [--size 98] [--crops 256] [--json FILE]

The host is a folder that spvit wrote (`spvit demo` leaves one in dense/), or DINOv2-S on crops of photographs, three
quarters of which are for training views. `one` does for a single budget what a frontier does for each; `compress` does
what `spvit compress --no-train` does, which repairs on four times as many views.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.data import TensorDataset

import spvit
from backbone import crops, load_model, load_photographs
from reporting import check_free, machine, write_results
from spvit.train.data import load_images

EIGHT = ("90%", "75%", "60%", "50%", "40%", "35%", "25%", "15%")
SIDES = {"eight": (EIGHT, 1), "one": (EIGHT[3:4], 1), "compress": (EIGHT[3:4], 4)}
"""Budgets, and views of each calibration image for the repair."""


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
    parser.add_argument("--json", help="file to write the rows to")
    options = parser.parse_args()
    options.device = "cpu"
    if (options.host is None) == (options.photographs is None):
        parser.error("name a model with --host, or a folder with --photographs")
    check_free(options.json)
    torch.set_num_threads(options.threads)
    host, images, count = subject(options)
    rows, config = [], spvit.FrontierConfig(calibration_images=count)
    for name, (budgets, views) in SIDES.items():
        started = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            found = spvit.frontier(host, images, budgets, output=folder, config=replace(config, repair_views=views))
        seconds = time.process_time() - started
        rows.append({"side": name, "budgets": len(found.points) - 1, "repair_views": views, "cpu_s": seconds})
        figures = ", ".join(f"{point.budget} {point.words}" for point in found.points)
        print(f"{name}: {seconds:.1f} s, of which scores {found.seconds['scores']:.1f} (clock); {figures}", flush=True)
    eight, one, compress = (row["cpu_s"] for row in rows)
    print(f"eight / one {eight / one:.2f}, eight / compress {eight / compress:.2f}; {machine()}")
    write_results(options.json, "frontier", rows, ratios={"one": eight / one, "compress": eight / compress})


if __name__ == "__main__":
    main()
