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
import functools
import gzip
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, cast

import timm
import torch
from rich.console import Console
from rich.table import Table
from spvit.hosts.base import network_costs
from torch import nn
from torch.utils.data import Subset

import spvit
from peers import random_architecture, taylor_gradients, torch_pruned_to, torch_pruned_widths
from reporting import check_free, machine, write_results
from spvit.budget import human, parse_budget
from spvit.checkpoint import Preprocessing, describe, replace_atomically
from spvit.cost import NetworkCost, count_macs, count_params
from spvit.hosts import family_of
from spvit.repair import repair
from spvit.train.compress import (
    CALIBRATION_IMAGES,
    CompressConfig,
    calibration,
    check_decision,
    deployed,
    figures_of,
    search,
)
from spvit.train.data import ImageConfig, Images, load_images
from spvit.train.loaders import training_loader
from spvit.train.loop import Phase, Run, run_phase
from spvit.train.progress import PhaseProgress
from spvit.train.run_folder import RunFolder
from spvit.train.settings import LoopConfig, PhaseConfig, SearchConfig

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
SIZES = {"vit": (1, 28, 28), "swin": (1, 32, 32)}
QUICK = {"images": 10_000, "dense_epochs": 4, "search_epochs": 1, "epochs": 1, "random": 2}
DENSE_LEARNING_RATE = 1e-3
TAYLOR_BATCHES = 10
METHODS = ("dense", "spvit", "searched", "calibrated", "random", "torch-pruning")
SEARCHES = ("searched", "calibrated")
"""What takes an hour more, for what docs/benchmarks.md has shown on held-out images already."""
STARTS = ("search repaired", "search", "host repaired", "host")
MEAN_ALONE = 1e9
"""A ridge under which nothing but biases is fitted; narrow attention is rotated by the images all the same."""


@dataclass(frozen=True)
class Row:
    """What one method reached at one budget."""

    budget: str
    method: str
    macs: int
    share: float
    """MACs divided by those of the dense model."""
    params: int
    after_pruning: float
    """Accuracy before fine-tuning, 0 to 1."""
    accuracy: float
    """Accuracy after fine-tuning, 0 to 1."""
    seconds: float
    """Everything that the method did after dense training, evaluation included."""


AVERAGED = ("macs", "share", "params", "after_pruning", "accuracy", "seconds")


class Bench:
    """The dense model, the images and the settings that all methods share."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console = options, console
        self.progress = PhaseProgress(console)
        self.loop = LoopConfig(seed=options.seed)
        self.finetuning = PhaseConfig(epochs=options.epochs, learning_rate=options.learning_rate)
        self.images = open_images(options)
        self.dense, self.dense_accuracy, self.dense_seconds = self._dense()
        self.images = replace(self.images, train=_first(self.images.train, options.images))
        self.cost: NetworkCost = network_costs(family_of(self.dense), self.dense)["macs"]
        self.rows: list[Row] = []
        self.notes: list[str] = []

    def _dense(self) -> tuple[nn.Module, float, float]:
        """Return the dense model, its accuracy and the seconds that training took, now or when it was kept."""
        options = self.options
        count = len(cast(Any, self.images.train))
        host = "dense" if options.host == "vit" else options.host
        name = f"fashion-mnist-{host}-{options.dense_epochs}-epochs-{count}-images-{options.held_out}-held-out"
        folder = Path(options.cache) / f"{name}-seed-{options.seed}"
        phase = PhaseConfig(epochs=options.dense_epochs, learning_rate=DENSE_LEARNING_RATE, warmup_epochs=1.0)
        make = functools.partial(make_dense, options.host)
        dense, seconds = kept_dense(folder, make, self.images, self.loop, phase, self.progress)
        accuracy = figures_of(dense, self.images, self.loop).accuracy
        self.note(f"dense model of {folder}: accuracy {accuracy:.2%}, trained in {seconds:.0f} s")
        return dense, accuracy, seconds

    def note(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def macs(self, model: nn.Module) -> int:
        """Return the MACs of one image."""
        return count_macs(model, lambda twin: twin(torch.zeros(1, *SIZES[self.options.host], device="meta")))

    def finish(
        self, budget: str, method: str, started: float, model: nn.Module, config: PhaseConfig | None = None
    ) -> Row:
        """Fine-tune a pruned model, by the dense one too if the settings distil, and record its row."""
        config = config or self.finetuning
        before = figures_of(model, self.images, self.loop)
        teacher = self.dense if config.distillation > 0 else None
        after = before
        if config.epochs > 0:
            with tempfile.TemporaryDirectory() as temporary:
                phase = Phase("finetune", model, config, teacher=teacher)
                loop = replace(self.loop, seed=self.options.finetune_seed)
                after = run_phase(phase, Run(self.images, RunFolder(temporary), loop, self.progress))
        seconds = time.perf_counter() - started
        model = deployed(model)
        macs = self.macs(model)
        share = macs / self.cost.dense
        row = Row(budget, method, macs, share, count_params(model), before.accuracy, after.accuracy, seconds)
        self.rows.append(row)
        self.write()
        self.note(f"{budget} {method}: {share:.1%} of the MACs, accuracy {row.accuracy:.2%}, {seconds:.0f} s")
        return row

    def title(self) -> str:
        """Return what the figures are of."""
        options = self.options
        label = " (QUICK: a subset, not for conclusions)" if options.quick else ""
        label += f" (LIMITED to {options.limit} images)" if options.limit else ""
        tested_on = f"{options.held_out} held-out training images" if options.held_out else "test images"
        return f"Fashion-MNIST, accuracy on {tested_on} at equal MACs, {machine()['threads']} threads{label}"

    def write(self) -> None:
        """Write what there is so far, where a file is named: a run of hours that ends early keeps its rows."""
        write_results(
            self.options.json,
            "fashion_mnist",
            [vars(row) for row in self.rows],
            anew=True,
            title=self.title(),
            settings=settings_of(self.options),
            dense={"accuracy": self.dense_accuracy, "macs": self.cost.dense, "seconds": self.dense_seconds},
            left_out=self.notes,
        )

    def run(self) -> None:
        """Run every method at every budget."""
        methods = {
            "dense": self.finetuned_dense,
            "spvit": self.repaired,
            "searched": self.searched,
            "calibrated": self.calibrated,
            "random": self.random,
            "torch-pruning": self.torch_pruning,
        }
        left_out = ("torch-pruning",) if self.options.host == "swin" else ()
        chosen = [method for name, method in methods.items() if name in set(self.options.methods) - set(left_out)]
        for budget in self.options.budgets:
            for method in chosen:
                try:
                    method(budget)
                except spvit.BudgetError as error:
                    self.notes.append(f"{budget} {method.__name__}: {error}")
                    self.note(self.notes[-1])

    def finetuned_dense(self, budget: str) -> None:
        """Fine-tune the dense model as long as the others, once."""
        if budget == self.options.budgets[0]:
            self.finish("100%", "dense, fine-tuned", time.perf_counter(), copy.deepcopy(self.dense))

    def repaired(self, budget: str) -> None:
        """Decide from calibration images without a search, repair, and fine-tune or leave it at that."""
        started = time.perf_counter()
        images = calibration(self.images, self.options.seed, CALIBRATION_IMAGES)
        architecture = spvit.decide(self.dense, macs=budget, calibration=images)
        self.note(str(architecture))
        model = spvit.prune(self.dense, architecture, repair=images)
        spent = time.perf_counter() - started
        untouched, untrained = spvit.prune(self.dense, architecture), replace(self.finetuning, epochs=0)
        shifted = copy.deepcopy(untouched)
        repair(shifted, self.dense, family_of(self.dense), architecture, images, ridge=MEAN_ALONE)
        for method, other in (("not repaired", untouched), ("mean shift only", shifted)):
            self.finish(budget, f"spvit, {method}, no training", started, other, untrained)
        rows = {
            "spvit, no training": untrained,
            "spvit": self.finetuning,
            "spvit, distilled": replace(self.finetuning, distillation=own_settings(0).distillation),
            "spvit, distilled, own settings": own_settings(self.options.epochs),
        }
        for method, settings in rows.items():
            # Every row needs the one decision and repair, so they count in each.
            self.finish(budget, method, time.perf_counter() - spent, copy.deepcopy(model), settings)

    def searched(self, budget: str) -> None:
        """Search gates as published; fine-tune what was found from the weights that the options name."""
        self._searched(budget, "gates", False, self.options.initialise)

    def calibrated(self, budget: str) -> None:
        """Search among repaired candidates; fine-tune from the search's weights, and from the host repaired anew."""
        self._searched(budget, "calibrated gates", True, ("search", "host repaired"))

    def _searched(self, budget: str, method: str, calibrated: bool, starts: Sequence[str]) -> None:
        options, started = self.options, time.perf_counter()
        shared = {**vars(self.finetuning), "epochs": options.search_epochs, "calibrated": calibrated}
        if options.search_learning_rate is not None:
            shared["learning_rate"] = options.search_learning_rate
        if options.budget_weight is not None:
            shared |= {"budget_weight": options.budget_weight, "budget_warmup": 0.0}
        config = SearchConfig(**shared, gate_learning_rate=options.gate_learning_rate)
        images = calibration(self.images, options.seed, CALIBRATION_IMAGES)
        limits = check_decision(self.dense, parse_budget(macs=budget), None)
        with tempfile.TemporaryDirectory() as temporary:
            run = Run(self.images, RunFolder(temporary), self.loop, self.progress)
            net, architecture = search(self.dense, limits, config, run)
        self.note(str(architecture))
        searching = time.perf_counter() - started
        for name in starts:
            begun = time.perf_counter() - searching
            weights = net if name.startswith("search") else None
            fixed = images if name.endswith("repaired") else None
            model = spvit.prune(self.dense, architecture, weights=weights, repair=fixed)
            self.finish(budget, f"{method}, {name}", begun, model)

    def random(self, budget: str) -> None:
        """Fine-tune architectures drawn at random, and record their mean too."""
        target = parse_budget(macs=budget).target(self.cost)
        rows = []
        for index in range(self.options.random):
            started = time.perf_counter()
            architecture = random_architecture(self.cost, target, random.Random(self.options.seed + index))
            model = spvit.prune(self.dense, architecture)
            rows.append(self.finish(budget, f"random {index + 1}", started, model))
        if rows:
            figures = {name: mean(getattr(row, name) for row in rows) for name in AVERAGED}
            averages = Row(budget, f"random, mean of {len(rows)}", **figures)
            self.rows.append(replace(averages, macs=round(averages.macs), params=round(averages.params)))

    def torch_pruning(self, budget: str) -> None:
        """Fine-tune what Torch-Pruning leaves at the budget."""
        started = time.perf_counter()
        torch.manual_seed(self.options.seed)
        batches = itertools.islice(training_loader(self.images), TAYLOR_BATCHES)
        gradients = taylor_gradients(self.dense, batches)
        target = parse_budget(macs=budget).target(self.cost)
        model = torch_pruned_to(self.dense, gradients, torch.zeros(1, *SIZES["vit"]), self.macs, target)
        self.note(f"{budget} Torch-Pruning: {torch_pruned_widths(model)}")
        self.finish(budget, "Torch-Pruning", started, model)


def own_settings(epochs: int) -> PhaseConfig:
    """Return the fine-tuning settings of `spvit compress`, but to end with the last weights.

    The best would be chosen by images that the figures are of.
    """
    return replace(CompressConfig().finetune, epochs=epochs, keep_best=False)


def kept_dense(
    folder: Path,
    make: Callable[[], nn.Module],
    images: Images,
    loop: LoopConfig,
    phase: PhaseConfig,
    progress: PhaseProgress,
) -> tuple[nn.Module, float]:
    """Return a dense model and the seconds that its training took: of a folder, or trained now and kept there."""
    if not folder.exists():
        torch.manual_seed(loop.seed)
        model = make()
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as temporary:
            run_phase(Phase("dense", model, phase), Run(images, RunFolder(temporary), loop, progress))
        metrics = {"seconds": time.perf_counter() - started}
        spvit.save(model, folder, preprocessing=images.preprocessing, metrics=metrics)
    return spvit.load(folder), describe(folder).metrics["seconds"]


def make_dense(host: str) -> nn.Module:
    """Return the untrained dense model: the ViT, or a Swin of three stages."""
    if host == "swin":
        shape: dict[str, Any] = {"embed_dim": 48, "depths": (2, 2, 2), "num_heads": (2, 4, 8)}
        small: dict[str, Any] = {"img_size": 32, "patch_size": 2, "window_size": 4, "in_chans": 1, "num_classes": 10}
        return cast(nn.Module, timm.create_model("swin_tiny_patch4_window7_224", **small, **shape))
    width: dict[str, int] = {"embed_dim": 96, "depth": 6, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", img_size=28, patch_size=4, in_chans=1, num_classes=10, **width)
    return cast(nn.Module, model)


def unpack(source: Path, cache: Path) -> None:
    """Unpack the .gz files of a folder to where torchvision looks for them, unless they are there."""
    raw = cache / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if not (raw / name).exists():
            content = gzip.decompress((source / f"{name}.gz").read_bytes())
            replace_atomically(raw / name, lambda path, content=content: path.write_bytes(content))


def open_images(options: argparse.Namespace) -> Images:
    """Return Fashion-MNIST as every method sees it, limited as the options say."""
    if options.data is not None:
        unpack(Path(options.data), Path(options.cache))
    config = ImageConfig(
        root=options.cache,
        download=options.data is None,
        batch_size=128,
        held_out=options.held_out,
        crop_scale=(0.8, 1.0),
        crop_ratio=(0.9, 1.1),
        flip=0.5,
    )
    images = load_images("FashionMNIST", config, SIZES[options.host], Preprocessing((0.286,), (0.353,), crop=1.0))
    train_count = options.limit or (QUICK["images"] if options.quick else None)
    return replace(images, train=_first(images.train, train_count), validation=_first(images.validation, options.limit))


def _first(dataset: Any, count: int | None) -> Any:
    return dataset if count is None or count >= len(dataset) else Subset(dataset, range(count))


def table_of(rows: list[Row], title: str) -> Table:
    """Return the rows as a table: accuracy right after pruning, and fine-tuned."""
    table = Table(title=title)
    for name in ("budget", "method", "MACs", "share", "params", "pruned", "tuned", "s"):
        table.add_column(name, justify="left" if name in ("budget", "method") else "right")
    for row in rows:
        table.add_row(
            row.budget,
            row.method,
            human(row.macs),
            f"{row.share:.1%}",
            human(row.params),
            f"{row.after_pruning:.2%}",
            f"{row.accuracy:.2%}",
            f"{row.seconds:.0f}",
        )
    return table


def make_parser(description: str | None = __doc__) -> argparse.ArgumentParser:
    """Return the parser of the command's options, which scripts on the same images share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=SIZES, default="vit", help="swin leaves Torch-Pruning out")
    parser.add_argument("--budgets", nargs="+", default=["50%", "25%"], help="MACs (default: half and a quarter)")
    parser.add_argument("--dense-epochs", type=int, help="of the dense model (default: 14; quick: 4)")
    parser.add_argument("--search-epochs", type=int, help="of the search (default: 2; quick: 1)")
    parser.add_argument("--epochs", type=int, help="of fine-tuning, for every method (default: 1)")
    parser.add_argument("--random", type=int, help="random architectures a budget (default: 5; quick: 2)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of search and fine-tuning (%(default)s)")
    usual = [method for method in METHODS if method not in SEARCHES]
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=usual, help="(default: all but searches)")
    parser.add_argument(
        "--initialise",
        nargs="+",
        choices=STARTS,
        default=["search repaired", "host"],
        help="weights that a searched network is fine-tuned from (default: %(default)s; `host` is as published)",
    )
    parser.add_argument("--search-learning-rate", type=float, help="of the search, if it is to be another")
    parser.add_argument("--gate-learning-rate", type=float, help="of the search (default: the library's)")
    parser.add_argument("--budget-weight", type=float, help="of the search, constant (default: the library's, rising)")
    parser.add_argument("--held-out", type=int, default=0, help="training images to validate on, not the test images")
    parser.add_argument("--images", type=int, help="training images for all that follows the dense model's training")
    parser.add_argument("--data", default=str(DEBIAN_FOLDER) if DEBIAN_FOLDER.is_dir() else None, help="the .gz files")
    parser.add_argument("--cache", default=str(Path.home() / ".cache" / "spvit"), help="images and dense models")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default: %(default)s)")
    parser.add_argument("--finetune-seed", type=int, help="of fine-tuning alone, if it is to be another")
    parser.add_argument("--quick", action="store_true", help=f"a rough run on {QUICK['images']:,} training images")
    parser.add_argument("--limit", type=int, help="training and validation images, to see the script work")
    parser.add_argument("--json", help="file to write the rows to")
    return parser


def parse_options(parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Return the command's options; --quick fills in what is not given."""
    options = (parser or make_parser()).parse_args()
    if options.finetune_seed is None:
        options.finetune_seed = options.seed
    defaults = {"dense_epochs": 14, "search_epochs": 2, "epochs": 1, "random": 5}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, QUICK[name] if options.quick else value)
    return options


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that a result depends on, without places on this machine."""
    return {name: value for name, value in vars(options).items() if name not in ("cache", "data", "json")}


def main() -> None:
    """Run all methods, writing the rows as they come, and print one table."""
    options = parse_options()
    check_free(options.json)
    console = Console()
    bench = Bench(options, console)
    bench.run()
    console.print(table_of(bench.rows, bench.title()))
    for note in bench.notes:
        bench.note(f"left out: {note}")
    bench.write()


if __name__ == "__main__":
    main()
