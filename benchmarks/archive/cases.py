"""Dense models with their images on which choices are compared: the demo's ViT on digits, and Fashion-MNIST's."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from fashion_mnist import Bench, kept_dense, make_parser
from spvit.checkpoint import Preprocessing
from spvit.cli.demo import demo_settings
from spvit.cost import NetworkCost
from spvit.hosts import family_of
from spvit.hosts.base import logits_of, network_costs
from spvit.train.compress import figures_of
from spvit.train.data import DIGITS, Images, load_images
from spvit.train.loop import Evaluation, Phase, run_phase
from spvit.train.losses import BudgetLoss
from spvit.train.progress import PhaseProgress
from spvit.train.settings import LoopConfig, PhaseConfig

DIGITS_HELD_OUT = 360
MULTIPLES = {DIGITS: 4, "fashion-mnist": 8}
"""Of ranks and FFN widths: with 8, the digits' heads of 16 would have one rank only."""


@dataclass(frozen=True)
class Case:
    """A trained dense model, and the images that it is compressed with."""

    name: str
    dense: nn.Module
    images: Images
    """Training images, and as validation images some that the dense model has not seen."""
    cost: NetworkCost
    loop: LoopConfig
    progress: PhaseProgress

    @property
    def multiple(self) -> int:
        """Of ranks and FFN widths."""
        return MULTIPLES[self.name]

    def figures(self, model: nn.Module) -> Evaluation:
        """Return a model's figures on the validation images."""
        return figures_of([model], self.images, self.loop)[0]

    def train(self, model: nn.Module, config: PhaseConfig, budget: BudgetLoss | None = None) -> Evaluation:
        """Fine-tune a model in place, or search one to a budget, by the dense one too if the settings distil."""
        teacher = self.dense if config.distillation > 0 else None
        with tempfile.TemporaryDirectory() as temporary:
            phase = Phase("finetune" if budget is None else "search", model, config, budget, teacher)
            return run_phase(phase, self.images, Path(temporary), self.loop, self.progress)


def make_case_parser(description: str | None, lengths: list[int] | None = None) -> argparse.ArgumentParser:
    """Return a parser of fashion_mnist.py's options, the data set, the seeds, and lengths of fine-tuning if given."""
    parser = make_parser(description)
    parser.add_argument("--data-set", choices=MULTIPLES, default=DIGITS, help="and its dense model (%(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of everything, one after the other")
    if lengths is not None:
        parser.add_argument(
            "--lengths", nargs="+", type=int, default=lengths, help="epochs of fine-tuning (%(default)s)"
        )
    return parser


def open_case(options: argparse.Namespace, seed: int, console: Console) -> Case:
    """Return the case that the options name; its dense model is trained unless it is kept in their cache."""
    options = argparse.Namespace(**{**vars(options), "seed": seed})
    if options.data_set != DIGITS:
        bench = Bench(options, console)
        return Case(options.data_set, bench.dense, bench.images, bench.cost, bench.loop, bench.progress)
    settings = demo_settings("", "50%", seed)
    size = (1, 8, 8)
    own = load_images(DIGITS, settings.images, size, Preprocessing())
    images = load_images(DIGITS, replace(settings.images, held_out=DIGITS_HELD_OUT), size, Preprocessing())
    # Both parts that training leaves out, for twice as many images to tell the choices apart; read once, as every epoch
    # looks at them.
    parts: list[Any] = [images.validation, own.validation]
    unseen: Any = [part[index] for part in parts for index in range(len(part))]
    images = replace(images, validation=unseen)
    loop, progress = LoopConfig(seed=seed), PhaseProgress(None)
    folder = Path(options.cache) / f"digits-dense-{DIGITS_HELD_OUT}-held-out-seed-{seed}"

    def make() -> nn.Module:
        model: nn.Module = timm.create_model(settings.model, **settings.model_args)
        return model

    dense, _ = kept_dense(folder, make, images, loop, settings.dense, progress)
    return Case(DIGITS, dense, images, network_costs(family_of(dense), dense)["macs"], loop, progress)


@torch.no_grad()
def log_probabilities(model: nn.Module, batches: list[Tensor]) -> Tensor:
    """Return a model's log probabilities of batches of images, [images, classes], in evaluation mode."""
    model.eval()
    return F.log_softmax(torch.cat([logits_of(model(batch)) for batch in batches]).double(), dim=1)


def divergence(found: Tensor, dense: Tensor) -> float:
    """Return the mean Kullback-Leibler divergence of log probabilities from dense ones, in nats."""
    return float(F.kl_div(found, dense, reduction="batchmean", log_target=True))
