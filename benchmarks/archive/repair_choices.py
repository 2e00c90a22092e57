"""What each part of the repair is worth, and how well scores predict, with nothing trained: Fashion-MNIST.

python benchmarks/repair_choices.py --held-out 5000 [--budgets 50% 25% 15% 10%] [--json FILE]

Options, images and the dense model are those of fashion_mnist.py. Everything is measured on its validation images, so
hold some training images out when choosing by what this prints.
"""

from __future__ import annotations

import copy
import itertools
import random
from dataclasses import dataclass, replace
from statistics import mean
from typing import cast

import torch
from cases import divergence, log_probabilities
from rich.console import Console
from rich.table import Table
from torch import nn

import spvit
from fashion_mnist import MEAN_ALONE, Bench, parse_options
from reporting import check_free, rank_correlation, write_results
from spvit.architecture import FFN, PREFIX_RULES, Architecture, Attention, Block, dense
from spvit.blockwise import reached
from spvit.budget import parse_budget
from spvit.decide import DEFAULT_MULTIPLE, choose
from spvit.hosts import family_of
from spvit.moments import RIDGE, Moments
from spvit.repair import repair
from spvit.scores import BlockScores, score
from spvit.train.deciding import CALIBRATION_IMAGES, calibration
from spvit.train.loaders import validation_loader

DRAWS = 20


@dataclass(frozen=True)
class Measured:
    """How one variant does on the validation images."""

    group: str
    variant: str
    accuracy: float
    divergence: float
    """Mean Kullback-Leibler divergence of its class probabilities from the dense model's, in nats."""


class Comparison:
    """The dense model, calibration images, and what has been measured."""

    def __init__(self, bench: Bench, console: Console) -> None:
        self.bench, self.console = bench, console
        self.images = calibration(bench.images, bench.options.seed, CALIBRATION_IMAGES)
        batches = list(validation_loader(bench.images))
        self.validation = [images for images, _ in batches]
        self.targets = torch.cat([targets for _, targets in batches])
        self.dense = log_probabilities(bench.dense, self.validation)
        self.scores = score(bench.dense, family_of(bench.dense), self.images, DEFAULT_MULTIPLE)
        self.rows: list[Measured] = []

    def measure(self, group: str, variant: str, model: nn.Module) -> float:
        """Record a model's figures and return its divergence."""
        found = log_probabilities(model, self.validation)
        accuracy = float((found.argmax(1) == self.targets).double().mean())
        diverged = divergence(found, self.dense)
        self.rows.append(Measured(group, variant, accuracy, diverged))
        return diverged

    def pruned(self, architecture: Architecture, ridge: float | None) -> nn.Module:
        """Return the dense model pruned, and repaired with a ridge unless that is None."""
        model = spvit.prune(self.bench.dense, architecture)
        if ridge is not None:
            repair(model, self.bench.dense, family_of(model), architecture, self.images, ridge)
        return model

    def parts_of_the_repair(self, budget: str) -> None:
        """Compare the repair with its mean shift alone and with none, for both rankings of FFN units."""
        target = parse_budget(macs=budget).target(self.bench.cost)
        chosen = choose(self.scores, self.bench.cost, target, DEFAULT_MULTIPLE)
        assert chosen is not None
        for ranking, architecture in (("repaired error", chosen), ("variance", self.ranked_by_variance(chosen))):
            for name, ridge in (("ridge", RIDGE), ("mean shift", MEAN_ALONE), ("no repair", None)):
                self.measure(budget, f"units by {ranking}, {name}", self.pruned(architecture, ridge))

    def ranked_by_variance(self, architecture: Architecture) -> Architecture:
        """Return an architecture of the same widths whose units have the most variance x squared column norm."""
        host = copy.deepcopy(self.bench.dense).eval()
        blocks = []
        for sites, block in zip(family_of(host).blocks(host), architecture.blocks):
            second = cast(nn.Linear, host.get_submodule(sites.ffn.second))
            moments = Moments()
            with torch.no_grad():
                for batch in self.images:
                    moments.add(reached(host, batch, second, output=False))
            needed = moments.covariance.diagonal() * second.weight.double().square().sum(0)
            units = sorted(needed.argsort(descending=True)[: len(block.ffn.units)].tolist())
            blocks.append(replace(block, ffn=FFN(block.ffn.width, tuple(units))))
        return replace(architecture, blocks=tuple(blocks))

    def rules_for_prefix_tokens(self) -> None:
        """Replace the attention of one block after the other by a convolution, under every rule for prefix tokens.

        Over each rule's blocks the means are recorded too.
        """
        whole = dense([block.units for block in self.bench.cost.blocks])
        for kind, rule in itertools.product(("conv3", "conv1"), PREFIX_RULES):
            variant = f"prefix tokens: {rule}"
            for index in range(len(whole.blocks)):
                blocks = list(whole.blocks)
                blocks[index] = replace(blocks[index], attention=Attention(kind))
                architecture = Architecture(tuple(blocks), rule)
                self.measure(f"block {index} {kind}", variant, self.pruned(architecture, RIDGE))
            rows = self.rows[-len(whole.blocks) :]
            means = (mean(getattr(row, name) for row in rows) for name in ("accuracy", "divergence"))
            self.rows.append(Measured(f"{kind}, mean over blocks", variant, *means))

    def how_scores_rank(self) -> float:
        """Return the rank correlation of the sum of scores with the divergence measured, over random candidates."""
        generator = random.Random(self.bench.options.seed)
        predicted, found = [], []
        for index in range(DRAWS):
            blocks, total = [], 0.0
            for scores in self.scores:
                block, loss = random_candidate(scores, generator)
                blocks.append(block)
                total += loss
            predicted.append(total)
            architecture = Architecture(tuple(blocks), "linear", "mean")
            found.append(self.measure("random candidates", f"draw {index + 1}", self.pruned(architecture, RIDGE)))
        return rank_correlation(predicted, found)


def random_candidate(scores: BlockScores, generator: random.Random) -> tuple[Block, float]:
    """Return what a block may become, drawn at random, and the sum of its two scores."""
    attention, loss = generator.choice(scores.attention)
    units = len(scores.ranking.units)
    width = DEFAULT_MULTIPLE * generator.randint(1, units // DEFAULT_MULTIPLE)
    kept = FFN(units, tuple(sorted(scores.ranking.units[:width])))
    return Block(attention, kept), loss + scores.ffn[width]


def table_of(rows: list[Measured]) -> Table:
    """Return the rows as a table."""
    table = Table()
    for name in ("group", "variant", "accuracy", "divergence"):
        table.add_column(name, justify="left" if name in ("group", "variant") else "right")
    for row in rows:
        table.add_row(row.group, row.variant, f"{row.accuracy:.2%}", f"{row.divergence:.5f}")
    return table


def main() -> None:
    """Measure, print, and write."""
    options = parse_options()
    check_free(options.json)
    console = Console()
    comparison = Comparison(Bench(options, console), console)
    for budget in options.budgets:
        comparison.parts_of_the_repair(budget)
    comparison.rules_for_prefix_tokens()
    correlation = comparison.how_scores_rank()
    console.print(table_of(comparison.rows))
    console.print(f"rank correlation of the sum of scores with the divergence measured: {correlation:.3f}")
    rows = [vars(row) for row in comparison.rows]
    write_results(options.json, "repair_choices", rows, rank_correlation=correlation)


if __name__ == "__main__":
    main()
