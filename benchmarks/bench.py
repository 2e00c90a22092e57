"""What methods on Fashion-MNIST are compared with: a dense model kept in a cache, the images, equal training, rows."""

from __future__ import annotations

import argparse
import gzip
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import mean
from typing import Any, cast

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import Subset

import spvit
from reporting import machine, write_results
from spvit.budget import human
from spvit.checkpoint import replace_atomically
from spvit.cost import NetworkCost, count_macs, count_params
from spvit.replacements.costs import network_costs
from spvit.train.compress import deployed
from spvit.train.data import Images, load_images
from spvit.train.figures import Evaluation, figures_of
from spvit.train.loop import Phase, Run, run_phase
from spvit.train.progress import PhaseProgress
from spvit.train.run_folder import DENSE, FINETUNE, RunFolder
from spvit.train.settings import CompressConfig, ImageConfig, LoopConfig, PhaseConfig

FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
SIZES = {"vit": (1, 28, 28), "swin": (1, 32, 32)}
QUICK_IMAGES = 10_000
DENSE_LEARNING_RATE = 1e-3


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


def mean_row(rows: Sequence[Row], method: str) -> Row:
    """Return the mean of rows of one budget."""
    figures = {field.name: mean(getattr(row, field.name) for row in rows) for field in fields(Row)[2:]}
    averages = Row(rows[0].budget, method, **figures)
    return replace(averages, macs=round(averages.macs), params=round(averages.params))


def own_settings(epochs: int) -> PhaseConfig:
    """Return the fine-tuning settings of `spvit compress`, except that it ends with the last weights.

    The best weights would be chosen by the images that the figures are of.
    """
    return replace(CompressConfig().finetune, epochs=epochs, keep_best=False)


def make_dense(host: str) -> nn.Module:
    """Return the untrained dense model: the ViT, or a Swin of three stages."""
    if host == "swin":
        shape: dict[str, Any] = {"embed_dim": 48, "depths": (2, 2, 2), "num_heads": (2, 4, 8)}
        small: dict[str, Any] = {"img_size": 32, "patch_size": 2, "window_size": 4, "in_chans": 1, "num_classes": 10}
        return cast(nn.Module, timm.create_model("swin_tiny_patch4_window7_224", **small, **shape))
    width: dict[str, int] = {"embed_dim": 96, "depth": 6, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", img_size=28, patch_size=4, in_chans=1, num_classes=10, **width)
    return cast(nn.Module, model)


def open_images(options: argparse.Namespace) -> Images:
    """Return Fashion-MNIST as every method sees it."""
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
    images = load_images("FashionMNIST", config, SIZES[options.host], spvit.Preprocessing((0.286,), (0.353,), crop=1.0))
    count = QUICK_IMAGES if options.quick else None
    return replace(images, train=_first(images.train, count), views=_first(images.views, count))


def unpack(source: Path, cache: Path) -> None:
    """Unpack the .gz files of a folder to where torchvision looks for them, unless they are there."""
    raw = cache / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if not (raw / name).exists():
            content = gzip.decompress((source / f"{name}.gz").read_bytes())
            replace_atomically(raw / name, lambda path, content=content: path.write_bytes(content))


def _first(dataset: Any, count: int | None) -> Any:
    return dataset if count is None or count >= len(dataset) else Subset(dataset, range(count))


class Bench:
    """The dense model, the images and the settings that all methods share, and the rows so far."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console = options, console
        self.progress = PhaseProgress(console)
        self.loop = LoopConfig(seed=options.seed)
        self.finetuning = PhaseConfig(epochs=options.epochs, learning_rate=options.learning_rate)
        self.images = open_images(options)
        self.dense, self.dense_accuracy, self.dense_seconds = self._dense()
        self.images = replace(self.images, train=_first(self.images.train, options.images))
        self.cost: NetworkCost = network_costs(self.dense)["macs"]
        self.rows: list[Row] = []
        self.notes: list[str] = []

    def _dense(self) -> tuple[nn.Module, float, float]:
        """Return the dense model, its accuracy, and the seconds that its training took, now or when it was kept."""
        options = self.options
        count = len(cast(Any, self.images.train))
        host = "dense" if options.host == "vit" else options.host
        name = f"fashion-mnist-{host}-{options.dense_epochs}-epochs-{count}-images-{options.held_out}-held-out"
        folder = Path(options.cache) / f"{name}-seed-{options.seed}"
        if not folder.exists():
            phase = PhaseConfig(epochs=options.dense_epochs, learning_rate=DENSE_LEARNING_RATE, warmup_epochs=1.0)
            torch.manual_seed(self.loop.seed)
            model = make_dense(options.host)
            started = time.perf_counter()
            self.train(Phase(DENSE, model, phase), self.loop)
            metrics = {"seconds": time.perf_counter() - started}
            spvit.save(model, folder, preprocessing=self.images.preprocessing, metrics=metrics)
        dense, seconds = spvit.load(folder, host=make_dense(options.host)), spvit.describe(folder).metrics["seconds"]
        accuracy = figures_of([dense], self.images, self.loop)[0].accuracy
        self.note(f"dense model of {folder}: accuracy {accuracy:.2%}, trained in {seconds:.0f} s")
        return dense, accuracy, seconds

    def train(self, phase: Phase, loop: LoopConfig) -> Evaluation:
        """Train a phase's model in place, in a run folder that is not kept, and return its figures."""
        with tempfile.TemporaryDirectory() as temporary:
            return run_phase(phase, Run(self.images, RunFolder(temporary), loop, self.progress))

    def note(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def macs(self, model: nn.Module) -> int:
        """Return the MACs of one image."""
        return count_macs(model, lambda twin: twin(torch.zeros(1, *SIZES[self.options.host], device="meta")))

    def finish(
        self, budget: str, method: str, started: float, model: nn.Module, config: PhaseConfig | None = None
    ) -> Row:
        """Fine-tune a pruned model, with the dense one as teacher if the settings distil, and record its row."""
        config = config or self.finetuning
        [before] = figures_of([model], self.images, self.loop)
        teacher = self.dense if config.distillation > 0 else None
        after = before
        if config.epochs > 0:
            phase = Phase(FINETUNE, model, config, teacher=teacher)
            after = self.train(phase, replace(self.loop, seed=self.options.finetune_seed))
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
        tested_on = f"{options.held_out} held-out training images" if options.held_out else "test images"
        return f"Fashion-MNIST, accuracy on {tested_on} at equal MACs, {machine()['threads']} threads{label}"

    def table(self) -> Table:
        """Return the rows as a table: accuracy right after pruning, and fine-tuned."""
        table = Table(title=self.title())
        for name in ("budget", "method", "MACs", "share", "params", "pruned", "tuned", "s"):
            table.add_column(name, justify="left" if name in ("budget", "method") else "right")
        for row in self.rows:
            counts = human(row.macs), f"{row.share:.1%}", human(row.params)
            accuracies = f"{row.after_pruning:.2%}", f"{row.accuracy:.2%}"
            table.add_row(row.budget, row.method, *counts, *accuracies, f"{row.seconds:.0f}")
        return table

    def write(self) -> None:
        """Write the rows so far, if a file is named: a run of hours that ends early keeps them."""
        settings = {name: value for name, value in vars(self.options).items() if name not in ("cache", "data", "json")}
        write_results(
            self.options.json,
            "fashion_mnist",
            [vars(row) for row in self.rows],
            anew=True,
            title=self.title(),
            settings=settings,
            dense={"accuracy": self.dense_accuracy, "macs": self.cost.dense, "seconds": self.dense_seconds},
            left_out=self.notes,
        )
