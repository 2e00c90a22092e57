"""What predicts accuracy after training: architectures of equal MACs, repaired, fine-tuned, and compared.

python benchmarks/trained_choices.py --seeds 0 1 --budgets 25% 12% --lengths 1 10 [--json FILE]
python benchmarks/trained_choices.py --data-set fashion-mnist --held-out 5000 --dense-epochs 5 --images 12000 \
    --budgets 25% 10% --lengths 1 [--json FILE]

At every budget: what decide chooses, from all candidates, without some kind, or with convolutions in some blocks; with
its scores multiplied by noise; and architectures that do not look at scores. Everything after pruning is measured on
images that nothing was trained on.
Other options are those of fashion_mnist.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from cases import Case, divergence, log_probabilities, make_case_parser, open_case
from rich.console import Console
from rich.table import Table

import spvit
from fashion_mnist import own_settings, parse_options, settings_of
from peers import random_architecture
from reporting import check_free, rank_correlation, summary, write_results
from spvit.architecture import FFN, Architecture, Attention, Block
from spvit.budget import parse_budget
from spvit.decide import TOLERANCE, choose
from spvit.hosts import family_of
from spvit.repair import PREFIX_RULE, SKIP_RULE
from spvit.scores import BlockScores, score
from spvit.train.deciding import CALIBRATION_IMAGES, calibration
from spvit.train.settings import PhaseConfig

CONVOLUTIONS = ("conv3", "conv1")
ALLOWED: dict[str, Callable[[Attention], bool]] = {
    "decide": lambda kept: True,
    "no convolutions": lambda kept: kept.kind not in CONVOLUTIONS,
    "no skip": lambda kept: kept.kind != "skip",
    "attention alone": lambda kept: kept.kind == "msa",
    "no narrow attention": lambda kept: not kept.narrowed(),
}
NOISE = {"weak": 0.5, "strong": 1.5}
"""Standard deviations of the logarithm of what scores are multiplied by."""
DRAWS = 2
PREDICTORS = ("sum_of_scores", "joint_divergence", "repaired_loss", "repaired_error", "convolutions", "skips", "ffn")
"""What is known before training; less should be better."""


@dataclass(frozen=True)
class Row:
    """One architecture: what is known before it is trained, and what training makes of it."""

    case: str
    seed: int
    budget: str
    name: str
    summary: str
    share: float
    """MACs divided by those of the dense model."""
    scores: tuple[float, ...] | None
    """Of every site, attention and FFN in turn; None where something was not scored."""
    joint_divergence: float
    """Of the outputs from the dense ones with all repaired, in nats, on the half of the calibration images that the
    repair has not seen."""
    convolutions: int
    skips: int
    ffn: float
    """Share of the MACs that FFNs have."""
    repaired_error: float
    """Share of validation images, 0 to 1, that are classed wrong, with nothing trained."""
    repaired_loss: float
    """Mean cross entropy with nothing trained."""
    trained_error: dict[int, float]
    """The same by epochs of fine-tuning."""
    trained_loss: dict[int, float]

    @property
    def mixes(self) -> bool:
        """Whether some block keeps attention; else a class token learns nothing of the image, trained or not."""
        return self.convolutions + self.skips < len(self.summary.split())

    @property
    def sum_of_scores(self) -> float | None:
        """What decide makes least."""
        return sum(self.scores) if self.scores is not None else None


class Comparison:
    """A case with the scores of its candidates."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.calibrating = calibration(case.images, case.loop.seed, CALIBRATION_IMAGES)
        self.fitting = [batch[::2] for batch in self.calibrating]
        self.measuring = [batch[1::2] for batch in self.calibrating]
        self.dense = log_probabilities(case.dense, self.measuring)
        self.scores = score(case.dense, family_of(case.dense), self.calibrating, case.multiple)

    def architectures(self, budget: str) -> dict[str, Architecture]:
        """Return architectures at a budget by name, each once; what cannot reach the budget is left out."""
        case = self.case
        target = parse_budget(macs=budget).target(case.cost)
        found = {}
        for name, allowed in ALLOWED.items():
            found[name] = self._chosen(restricted(self.scores, allowed), target)
        for count in sorted({len(self.scores) // 3, 2 * len(self.scores) // 3}):
            found[f"{count} convolutions"] = self._chosen(with_convolutions(self.scores, count), target)
        for strength, sigma in NOISE.items():
            for draw in range(DRAWS):
                generator = random.Random(f"{case.loop.seed} {strength} {draw}")
                found[f"{strength} noise {draw + 1}"] = self._chosen(perturbed(self.scores, sigma, generator), target)
        found["uniform"] = self._uniform(target)
        drawn = random_architecture(case.cost, target, random.Random(case.loop.seed))
        found["random"] = replace(drawn, prefix_rule=PREFIX_RULE, skip_rule=SKIP_RULE)
        names = {architecture: name for name, architecture in reversed(found.items()) if architecture is not None}
        return {name: architecture for architecture, name in reversed(names.items())}

    def _chosen(self, scores: tuple[BlockScores, ...], target: int) -> Architecture | None:
        chosen = choose(scores, self.case.cost, target, self.case.multiple)
        return chosen if chosen is not None and self._near(chosen, target) else None

    def _near(self, architecture: Architecture, target: int) -> bool:
        return abs(self.case.cost.of(architecture) - target) <= 4 * TOLERANCE * target

    def _uniform(self, target: int) -> Architecture | None:
        """Return equal ranks and equal FFN widths in all blocks, of nearly equal shares of the dense ones."""
        case, options = self.case, []
        for rank in range(case.multiple, case.cost.blocks[0].head_width, case.multiple):
            for width in range(case.multiple, case.cost.blocks[0].units + 1, case.multiple):
                attention = Attention.narrow(rank)
                blocks = [
                    Block(attention, FFN(own.units, tuple(sorted(scores.ranking.units[:width]))))
                    for own, scores in zip(case.cost.blocks, self.scores)
                ]
                option = Architecture(tuple(blocks), PREFIX_RULE, SKIP_RULE)
                if self._near(option, target):
                    shares = rank / case.cost.blocks[0].head_width, width / case.cost.blocks[0].units
                    options.append((abs(math.log(shares[0] / shares[1])), rank, width, option))
        return min(options)[-1] if options else None

    def measure(self, budget: str, name: str, architecture: Architecture, settings: dict[int, PhaseConfig]) -> Row:
        """Return an architecture's figures before and after fine-tuning, by epochs."""
        case = self.case
        half = spvit.prune(case.dense, architecture, repair=self.fitting)
        repaired = spvit.prune(case.dense, architecture, repair=self.calibrating)
        before = case.figures(repaired)
        after = {epochs: case.train(copy.deepcopy(repaired), config) for epochs, config in settings.items()}
        kinds = architecture.kinds()
        ffn = sum(own.unit * len(block.ffn.units) for own, block in zip(case.cost.blocks, architecture.blocks))
        return Row(
            case=case.name,
            seed=case.loop.seed,
            budget=budget,
            name=name,
            summary=summary(architecture),
            share=case.cost.of(architecture) / case.cost.dense,
            scores=self._scores(architecture) if name != "random" else None,
            joint_divergence=divergence(log_probabilities(half, self.measuring), self.dense),
            convolutions=sum(kind in CONVOLUTIONS for kind in kinds),
            skips=sum(kind == "skip" for kind in kinds),
            ffn=ffn / case.cost.of(architecture),
            repaired_error=1 - before.accuracy,
            repaired_loss=before.loss,
            trained_error={epochs: 1 - figures.accuracy for epochs, figures in after.items()},
            trained_loss={epochs: figures.loss for epochs, figures in after.items()},
        )

    def _scores(self, architecture: Architecture) -> tuple[float, ...]:
        found = []
        for scores, block in zip(self.scores, architecture.blocks):
            found += [dict(scores.attention)[block.attention], scores.ffn[len(block.ffn.units)]]
        return tuple(found)


def restricted(scores: tuple[BlockScores, ...], allowed: Callable[[Attention], bool]) -> tuple[BlockScores, ...]:
    """Return scores with those attention candidates that are allowed."""
    return tuple(
        replace(block, attention=tuple((kept, loss) for kept, loss in block.attention if allowed(kept)))
        for block in scores
    )


def with_convolutions(scores: tuple[BlockScores, ...], count: int) -> tuple[BlockScores, ...]:
    """Return scores in which so many blocks may become convolutions only: those where that has the best scores."""
    only = restricted(scores, lambda kept: kept.kind in CONVOLUTIONS)
    best = sorted(range(len(scores)), key=lambda index: min(loss for _, loss in only[index].attention))[:count]
    return tuple(only[index] if index in best else block for index, block in enumerate(scores))


def perturbed(scores: tuple[BlockScores, ...], sigma: float, generator: random.Random) -> tuple[BlockScores, ...]:
    """Return scores multiplied by lognormal noise, one factor for every site and kind."""

    def factor() -> float:
        return generator.lognormvariate(0.0, sigma)

    found = []
    for block in scores:
        factors: defaultdict[str, float] = defaultdict(factor)
        attention = tuple((kept, loss * factors[kept.kind]) for kept, loss in block.attention)
        own = factor()
        found.append(replace(block, attention=attention, ffn=tuple(own * loss for loss in block.ffn)))
    return tuple(found)


Group = tuple[str, int, str]


def grouped(rows: list[Row]) -> dict[Group, list[Row]]:
    """Return the scored rows that may be compared, of one dense model and one budget."""
    groups: defaultdict[Group, list[Row]] = defaultdict(list)
    for row in rows:
        if row.scores is not None and row.mixes:
            groups[row.case, row.seed, row.budget].append(row)
    return dict(groups)


def correlations(rows: list[Row], lengths: list[int]) -> Table:
    """Return rank correlations of what predicts with what training leaves, means over the groups by budget."""
    table = Table(title="rank correlation with cross entropy / error after training; mean over dense models")
    for name in ("predictor", "budget", *(f"{epochs} epochs" for epochs in lengths)):
        table.add_column(name)
    groups = grouped(rows)
    for predictor in PREDICTORS:
        for budget in dict.fromkeys(key[2] for key in groups):
            members = [group for key, group in groups.items() if key[2] == budget]
            cells = []
            for epochs in lengths:
                pair = []
                for outcome in ("trained_loss", "trained_error"):
                    values = [
                        rank_correlation(
                            [getattr(row, predictor) for row in group], [getattr(row, outcome)[epochs] for row in group]
                        )
                        for group in members
                    ]
                    pair.append(f"{mean(values):+.2f}")
                cells.append(" / ".join(pair))
            table.add_row(predictor, budget, *cells)
    return table


def regrets(rows: list[Row], lengths: list[int]) -> Table:
    """Return how much worse than the best of its group the choice of each predictor ends, means over the groups."""
    table = Table(title="cross entropy / accuracy points lost against the best of the set; mean over dense models")
    for name in ("least", "budget", *(f"{epochs} epochs" for epochs in lengths)):
        table.add_column(name)
    groups = grouped(rows)
    for predictor in PREDICTORS[:4]:
        for budget in dict.fromkeys(key[2] for key in groups):
            cells = []
            for epochs in lengths:
                pairs = []
                for key, group in groups.items():
                    if key[2] == budget:
                        pick = min(group, key=lambda row: getattr(row, predictor))
                        pairs.append((
                            pick.trained_loss[epochs] - min(row.trained_loss[epochs] for row in group),
                            pick.trained_error[epochs] - min(row.trained_error[epochs] for row in group),
                        ))  # fmt: skip
                cells.append(f"{mean(loss for loss, _ in pairs):.4f} / {100 * mean(e for _, e in pairs):.2f}")
            table.add_row(predictor, budget, *cells)
    return table


def table_of(rows: list[Row], lengths: list[int]) -> Table:
    """Return the rows as a table."""
    table = Table(title="accuracy and cross entropy, repaired and after epochs of fine-tuning")
    for name in ("seed", "budget", "architecture", "blocks", "MACs", "sum", "joint", "repaired"):
        table.add_column(name)
    for epochs in lengths:
        table.add_column(f"{epochs} epochs")
    for row in rows:
        trained = [f"{1 - row.trained_error[epochs]:.2%} {row.trained_loss[epochs]:.4f}" for epochs in lengths]
        total = "" if row.sum_of_scores is None else f"{row.sum_of_scores:.4f}"
        figures = [f"{row.share:.1%}", total, f"{row.joint_divergence:.4f}"]
        repaired = f"{1 - row.repaired_error:.2%} {row.repaired_loss:.4f}"
        table.add_row(str(row.seed), row.budget, row.name, row.summary, *figures, repaired, *trained)
    return table


def measured(options: argparse.Namespace, console: Console) -> list[Row]:
    """Return the rows of all seeds and budgets."""
    settings = {epochs: own_settings(epochs) for epochs in options.lengths}
    if options.finetune_rate is not None:
        settings = {n: replace(config, learning_rate=options.finetune_rate) for n, config in settings.items()}
    rows = []
    for seed in options.seeds:
        case = open_case(options, seed, console)
        comparison = Comparison(case)
        console.print(f"{case.name}, seed {seed}: dense {case.figures(case.dense)}", highlight=False, soft_wrap=True)
        for budget in options.budgets:
            for name, architecture in comparison.architectures(budget).items():
                if options.only and name not in options.only:
                    continue
                rows.append(comparison.measure(budget, name, architecture, settings))
                console.print(rows[-1].budget, name, rows[-1].summary, rows[-1].trained_loss, highlight=False)
    return rows


def written(path: str) -> list[Row]:
    """Return the rows of a file that --json wrote."""
    rows = []
    for values in json.loads(Path(path).read_text(encoding="utf-8"))["rows"]:
        for name in ("trained_error", "trained_loss"):
            values[name] = {int(epochs): value for epochs, value in values[name].items()}
        rows.append(Row(**values))
    return rows


def main() -> None:
    """Measure every architecture, or read what was measured; print the tables, and write the rows."""
    parser = make_case_parser(__doc__, [1, 10])
    parser.add_argument("--only", nargs="+", help="architectures by name (default: all)")
    parser.add_argument("--finetune-rate", type=float, help="learning rate (default: that of spvit compress)")
    parser.add_argument("--tables-of", nargs="+", help="measure nothing: files that --json wrote, read together")
    options = parse_options(parser)
    check_free(options.json)
    console = Console(width=200)
    if options.tables_of:
        rows = [row for path in options.tables_of for row in written(path)]
        lengths = sorted(rows[0].trained_loss)
    else:
        rows, lengths = measured(options, console), options.lengths
    for table in (table_of(rows, lengths), correlations(rows, lengths), regrets(rows, lengths)):
        console.print(table)
    write_results(options.json, "trained_choices", [vars(row) for row in rows], settings=settings_of(options))


if __name__ == "__main__":
    main()
