"""Accuracy at equal MACs on Fashion-MNIST: spvit, random architectures of the same cost, and Torch-Pruning.

python benchmarks/fashion_mnist.py [--budgets 50% 25%] [--epochs 1] [--quick] [--json FILE]

One small ViT (or Swin: --host swin) is trained once and kept under --cache. At each budget every method gets the same
fine-tuning: epochs, augmentation, optimizer; rows of "own settings" fine-tune with the defaults of `spvit compress`.
The images are those of Debian's package dataset-fashion-mnist, or downloaded by torchvision. Torch-Pruning comes with:
pip install 'spvit[bench]'.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

import spvit
from bench import QUICK_IMAGES, SIZES, Bench, mean_row, own_settings
from peers import random_architecture, taylor_gradients, torch_pruned_to, torch_pruned_widths
from reporting import check_free
from spvit.budget import Budget
from spvit.train.compress import search
from spvit.train.data import calibration, training_loader
from spvit.train.loop import Run
from spvit.train.run_folder import RunFolder
from spvit.train.settings import CALIBRATION_IMAGES, REPAIR_VIEWS, SearchConfig

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
LENGTHS = {"dense_epochs": 14, "search_epochs": 2, "epochs": 1, "random": 5}
QUICK_LENGTHS = {"dense_epochs": 4, "search_epochs": 1, "epochs": 1, "random": 2}
TAYLOR_BATCHES = 10
STARTS = ("search repaired", "search", "host repaired", "host")


def finetuned_dense(bench: Bench, budget: str) -> None:
    """Fine-tune the dense model as long as the others, once."""
    if budget == bench.options.budgets[0]:
        bench.finish("100%", "dense, fine-tuned", time.perf_counter(), copy.deepcopy(bench.dense))


def scored(bench: Bench, budget: str) -> None:
    """Decide from calibration images without a search, repair, and fine-tune or leave it at that."""
    started = time.perf_counter()
    seed = bench.options.seed
    images = calibration(bench.images, seed, CALIBRATION_IMAGES)
    architecture = spvit.decide(bench.dense, macs=budget, calibration=images)
    bench.note(str(architecture))
    views = calibration(bench.images, seed, REPAIR_VIEWS * CALIBRATION_IMAGES)
    model = spvit.prune(bench.dense, architecture, repair=views)
    spent = time.perf_counter() - started
    untrained = replace(bench.finetuning, epochs=0)
    untouched = spvit.prune(bench.dense, architecture)
    bench.finish(budget, "spvit, not repaired, no training", started, untouched, untrained)
    rows = {
        "spvit, no training": untrained,
        "spvit": bench.finetuning,
        "spvit, distilled": replace(bench.finetuning, distillation=own_settings(0).distillation),
        "spvit, distilled, own settings": own_settings(bench.options.epochs),
    }
    for method, settings in rows.items():
        # Every row needs the one decision and repair, so they count in each.
        bench.finish(budget, method, time.perf_counter() - spent, copy.deepcopy(model), settings)


def searched(bench: Bench, budget: str) -> None:
    """Search gates as published; fine-tune what was found, from the weights that the options name."""
    options, started = bench.options, time.perf_counter()
    config = SearchConfig(**{**vars(bench.finetuning), "epochs": options.search_epochs})
    with tempfile.TemporaryDirectory() as temporary:
        run = Run(bench.images, RunFolder(temporary), bench.loop, bench.progress)
        net, architecture = search(bench.dense, {"macs": budget}, config, run)
    bench.note(str(architecture))
    searching = time.perf_counter() - started
    images = list(calibration(bench.images, options.seed, REPAIR_VIEWS * CALIBRATION_IMAGES))
    for name in options.initialise:
        begun = time.perf_counter() - searching
        weights = net if name.startswith("search") else None
        repairing = images if name.endswith("repaired") else None
        model = spvit.prune(bench.dense, architecture, weights=weights, repair=repairing)
        bench.finish(budget, f"gates, {name}", begun, model)


def randomly_drawn(bench: Bench, budget: str) -> None:
    """Fine-tune architectures drawn at random, and record their mean too."""
    target = Budget.parse(macs=budget).target(bench.cost)
    rows = []
    for index in range(bench.options.random):
        started = time.perf_counter()
        architecture = random_architecture(bench.cost, target, random.Random(bench.options.seed + index))
        model = spvit.prune(bench.dense, architecture)
        rows.append(bench.finish(budget, f"random {index + 1}", started, model))
    if rows:
        bench.rows.append(mean_row(rows, f"random, mean of {len(rows)}"))


def torch_pruning(bench: Bench, budget: str) -> None:
    """Fine-tune what Torch-Pruning leaves at the budget."""
    if bench.options.host == "swin":
        bench.notes.append(f"{budget} Torch-Pruning: only for the ViT")
        return
    started = time.perf_counter()
    torch.manual_seed(bench.options.seed)
    batches = itertools.islice(training_loader(bench.images), TAYLOR_BATCHES)
    gradients = taylor_gradients(bench.dense, batches)
    target = Budget.parse(macs=budget).target(bench.cost)
    model = torch_pruned_to(bench.dense, gradients, torch.zeros(1, *SIZES["vit"]), bench.macs, target)
    bench.note(f"{budget} Torch-Pruning: {torch_pruned_widths(model)}")
    bench.finish(budget, "Torch-Pruning", started, model)


METHODS: dict[str, Callable[[Bench, str], None]] = {
    "dense": finetuned_dense,
    "spvit": scored,
    "searched": searched,
    "random": randomly_drawn,
    "torch-pruning": torch_pruning,
}
USUAL = [name for name in METHODS if name != "searched"]
"""A search takes an hour more, to lose as docs/experiments/search-settings.md shows."""


def run(bench: Bench) -> None:
    """Run every chosen method at every budget."""
    for budget in bench.options.budgets:
        for name, method in METHODS.items():
            if name not in bench.options.methods:
                continue
            try:
                method(bench, budget)
            except spvit.BudgetError as error:
                bench.notes.append(f"{budget} {name}: {error}")
                bench.note(bench.notes[-1])


def parse_options() -> argparse.Namespace:
    """Return the command's options; --quick fills in what is not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--host", choices=SIZES, default="vit", help="swin leaves Torch-Pruning out")
    add("--budgets", nargs="+", default=["50%", "25%"], help="MACs (default: half and a quarter)")
    add("--dense-epochs", type=int, help="of the dense model (default: 14; quick: 4)")
    add("--search-epochs", type=int, help="of the search (default: 2; quick: 1)")
    add("--epochs", type=int, help="of fine-tuning, for every method (default: 1)")
    add("--random", type=int, help="random architectures a budget (default: 5; quick: 2)")
    add("--learning-rate", type=float, default=5e-4, help="of search and fine-tuning (%(default)s)")
    add("--methods", nargs="+", choices=METHODS, default=USUAL, help="(default: all but searched)")
    add(
        "--initialise",
        nargs="+",
        choices=STARTS,
        default=["search repaired", "host"],
        help="weights that a searched network is fine-tuned from (default: %(default)s; `host` is as published)",
    )
    add("--held-out", type=int, default=0, help="training images to validate on, not the test images")
    add("--images", type=int, help="training images for all that follows the dense model's training")
    add("--data", default=str(DEBIAN_FOLDER) if DEBIAN_FOLDER.is_dir() else None, help="folder of the .gz files")
    add("--cache", default=str(Path.home() / ".cache" / "spvit"), help="images and dense models")
    add("--seed", type=int, default=0, help="of everything (default: %(default)s)")
    add("--finetune-seed", type=int, help="of fine-tuning alone, if it is to be another")
    add("--quick", action="store_true", help=f"a rough run on {QUICK_IMAGES:,} training images")
    add("--json", help="file to write the rows to")
    options = parser.parse_args()
    if options.finetune_seed is None:
        options.finetune_seed = options.seed
    for name, value in (QUICK_LENGTHS if options.quick else LENGTHS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    """Run all methods, writing the rows as they come, and print one table."""
    options = parse_options()
    check_free(options.json)
    console = Console()
    bench = Bench(options, console)
    run(bench)
    console.print(bench.table())
    for note in bench.notes:
        bench.note(f"left out: {note}")
    bench.write()


if __name__ == "__main__":
    main()
