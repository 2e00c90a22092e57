"""What int8 costs a backbone, whole and pruned: size, latency and features of each in fp32 and int8.

python benchmarks/int8.py --images FOLDER [--model NAME] [--weights FILE] [--size 98] [--budgets 50% 25%] [--seed 1]
                          [--json FILE]

Photographs, not crops, are split into calibration and test. Crops of the first score, repair and calibrate, and choose
how int8 is made; features of crops of the others are compared. Nothing is trained. Latency is onnxruntime's on the CPU,
batch 1, all files in turns, with as many threads as OMP_NUM_THREADS says.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import spvit
from backbone import TEST_CROPS, TEST_SHARE, crops, load_model, load_photographs
from reporting import check_free, write_results
from spvit.runtimes.quantize import answers
from spvit.runtimes.writers import session
from spvit.speed.benchmark import benchmark


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Return a row for every budget and precision."""
    dense, photographs = load_model(options), load_photographs(options.images)
    normal = timm.data.resolve_model_data_config(dense)
    shuffled = random.Random(options.seed).sample(photographs, len(photographs))
    tested = max(1, round(TEST_SHARE * len(shuffled)))
    calibration = crops(shuffled[tested:], options.count, options.size, options.seed, normal)
    test = crops(shuffled[:tested], TEST_CROPS, options.size, options.seed + 50, normal)
    scores = spvit.score(dense, calibration)
    models = {"100%": dense}
    for budget in options.budgets:
        models[budget] = spvit.prune(dense, spvit.decide(dense, macs=budget, scores=scores), repair=calibration)
    rows: list[dict[str, Any]] = []
    for budget, model in track(list(models.items()), "export", console=Console(stderr=True)):
        for precision in ("fp32", "int8"):
            path, more = folder / f"{budget} {precision}.onnx", {"precision": precision, "calibration": calibration}
            done = spvit.export(model, path, images=test, most_drop=1.0, opset=options.opset, **more)
            row = {"macs": budget, "precision": precision, "bytes": done.bytes, "file": path}
            row |= {"outputs": answers(session(path), test)}
            if done.quantised is not None:
                row |= {"smoothing": done.quantised.smoothing, "calibration": done.quantised.calibration}
                row |= {"own": done.agreement}
            rows.append(row)
    centre = rows[0]["outputs"].mean(0)
    for row, found in zip(rows, benchmark(*(row.pop("file") for row in rows), batches=(1,), seconds=3)):
        own, wanted = row["outputs"], rows[0]["outputs"]
        latency = found.latency[0]
        row |= {"cosine": float(torch.cosine_similarity(own, wanted).mean()), "ms": latency.latency_ms}
        row |= {"centred": float(torch.cosine_similarity(own - centre, wanted - centre).mean())}
        row |= {"speed": latency.speed_up, "spread_ms": latency.spread_ms, "threads": latency.threads}
    for row in rows:
        del row["outputs"]
    return rows


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    """Return the rows as a table."""
    table = Table(title=title)
    for column in (
        "MACs",
        "precision",
        "MB",
        "ms",
        "speed",
        "cosine",
        "centred",
        "to own fp32",
        "SmoothQuant",
        "ranges",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        figures = [f"{row['bytes'] / 1e6:.1f}", f"{row['ms']:.1f} ± {row['spread_ms']:.1f}", f"{row['speed']:.2f}x"]
        figures += [f"{row['cosine']:.4f}", f"{row['centred']:.4f}"]
        way = [f"{row['own']:.4f}", str(row["smoothing"] or "off"), row["calibration"]] if "own" in row else [""] * 3
        table.add_row(row["macs"], row["precision"], *figures, *way)
    return table


def parse_options() -> argparse.Namespace:
    """Return the command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of photographs")
    parser.add_argument("--model", default="vit_small_patch14_dinov2", help="a timm ViT (default: %(default)s)")
    parser.add_argument("--weights", help="safetensors file for it (default: timm's pretrained weights)")
    parser.add_argument("--size", type=int, default=98, help="pixels of the sides of crops (default: %(default)s)")
    parser.add_argument("--count", type=int, default=800, help="calibration crops (default: %(default)s)")
    parser.add_argument("--budgets", nargs="+", default=["50%", "25%"], help="of the MACs")
    parser.add_argument("--opset", type=int, default=18, help="of ONNX (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the split and the crops (default: %(default)s)")
    parser.add_argument("--json", help="file to write the rows to")
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write the rows."""
    options = parse_options()
    check_free(options.json)
    options.device = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, Path(folder))
    threads = f"{rows[0]['threads']} thread{'s'[: rows[0]['threads'] != 1]}"
    title = f"{options.model}, {options.size} px, {TEST_CROPS} test crops, batch 1, {threads}, in turns"
    Console(width=140).print(table_of(rows, title))
    write_results(options.json, "int8", rows, settings=vars(options))


if __name__ == "__main__":
    main()
