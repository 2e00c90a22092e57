"""A folder of 70,000 PNG files, made of Fashion-MNIST, and a run on it that is stopped and killed.

python benchmarks/png_folder.py FOLDER [--run RUNS] [--data FOLDER_OF_GZ]

Writes train/ and val/ with a folder a class, and says how long it takes to list them and to look at their headers.
With --run it trains a tiny ViT for an epoch, then compresses it with a search and a distilled fine-tuning of an epoch
each: SIGTERM in the search, --resume, SIGKILL in the search, --resume, SIGKILL in the fine-tuning, --resume. The model
must have the bytes of one that was never stopped. The images are those of Debian's package dataset-fashion-mnist, or
downloaded by torchvision. Files that are there already stay as they are.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from torchvision.datasets import FashionMNIST

from bench import unpack
from fashion_mnist import DEBIAN_FOLDER
from spvit.checkpoint import Preprocessing
from spvit.train.data import load_images
from spvit.train.headers import checked
from spvit.train.loop import Run
from spvit.train.run_folder import RunFolder
from spvit.train.settings import ImageConfig, LoopConfig

SHAPE = {"img_size": 28, "patch_size": 7, "embed_dim": 48, "depth": 3, "num_heads": 3, "in_chans": 1}
IMAGES = ["--images.batch_size", "256", "--images.flip", "0", "--images.workers", "1"]
GREY = ["--images.mean", "[0.286]", "--images.std", "[0.353]"]
EPOCHS = ["--macs", "50%", "--search.epochs", "1", "--epochs", "1", "--save_minutes", "0.25"]
ENDS = (("search", 60, signal.SIGTERM), ("search", 140, signal.SIGKILL), ("finetune", 100, signal.SIGKILL))


def write(folder: Path, data: Path) -> None:
    """Write the files."""
    with tempfile.TemporaryDirectory() as cache:
        if data.is_dir():
            unpack(data, Path(cache))
        for split in ("train", "val"):
            images = FashionMNIST(cache, train=split == "train", download=True)
            for index, (image, label) in enumerate(zip(images.data.numpy(), images.targets.tolist())):
                path = folder / split / images.classes[label].replace("/", "-") / f"{index:05d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.exists():
                    Image.fromarray(image).save(path)


def look(folder: Path) -> None:
    """Print how long it takes to list the files, to look at their headers, and to do so again."""
    started = time.perf_counter()
    images = load_images(str(folder), ImageConfig(), (1, 28, 28), Preprocessing((0.286,), (0.353,)))
    said("listed", time.perf_counter() - started)
    with tempfile.TemporaryDirectory() as output:
        for what in ("headers read", "known from before"):
            started = time.perf_counter()
            checked(Run(images, RunFolder(output), LoopConfig()))
            said(what, time.perf_counter() - started)


def said(what: str, seconds: float) -> None:
    """Print a line of so many seconds for all files."""
    print(f"70,000 files {what} in {seconds:.2f} s: {70_000 / seconds:,.0f} a second", flush=True)


def spvit(*words: object) -> subprocess.Popen[bytes]:
    """Start a command of spvit."""
    print("spvit", *words, flush=True)
    return subprocess.Popen([sys.executable, "-m", "spvit_command", *map(str, words)])


def done(run: subprocess.Popen[bytes], code: int = 0) -> None:
    """Wait for a command, which is to end with a code."""
    started = time.perf_counter()
    if (found := run.wait()) != code:
        raise SystemExit(f"exit code {found}, expected {code}")
    print(f"exit code {code} after another {time.perf_counter() - started:.0f} s", flush=True)


def steps(output: Path, phase: str) -> int:
    """Return the last step that a phase has recorded."""
    metrics = output / "metrics.jsonl"
    lines = metrics.read_text().split("\n")[:-1] if metrics.is_file() else []
    found = [values for values in map(json.loads, lines) if values.get("phase") == phase]
    return max((values.get("step", 0) for values in found), default=0)


def stop_and_continue(folder: Path, runs: Path) -> None:
    """Compress a model that is trained first, twice: stopped and killed, and in one go."""
    arguments = ["--model", "vit_tiny_patch16_224", "--model_args", json.dumps(SHAPE), "--pretrained", "false"]
    dense, cut, whole = runs / "dense", runs / "cut", runs / "whole"
    done(spvit("train", *arguments, "--data", folder, *IMAGES, *GREY, "--epochs", 1, "--output", dense))
    words = ["compress", "--model", dense, "--data", folder, *IMAGES, *EPOCHS, "--output"]
    run = spvit(*words, cut)
    for phase, step, number in ENDS:
        while steps(cut, phase) < step and run.poll() is None:
            time.sleep(0.2)
        run.send_signal(number)
        print(f"{number.name} at step {steps(cut, phase)} of {phase}", flush=True)
        done(run, 128 + number if number == signal.SIGTERM else -number)
        run = spvit("compress", "--output", cut, "--resume")
    done(run)
    done(spvit("evaluate", "--model", cut, "--data", folder))
    done(spvit(*words, whole))
    same = (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    print(f"the model has {'the same' if same else 'OTHER'} bytes as one that was never stopped")


def main() -> None:
    """Write, look, run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write the images to")
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder of the .gz files, if there is one")
    parser.add_argument("--run", type=Path, help="new folder for the runs")
    options = parser.parse_args()
    write(options.folder, options.data)
    look(options.folder)
    if options.run is not None:
        stop_and_continue(options.folder, options.run)


if __name__ == "__main__":
    main()
