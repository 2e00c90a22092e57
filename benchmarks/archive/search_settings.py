"""What the settings of a search are worth: its outcome under several, fine-tuned alike, on images it has not seen.

python benchmarks/search_settings.py --seeds 0 1 2 --budgets 25% --search-epochs 10 --epochs 10 [--json FILE]
python benchmarks/search_settings.py --data-set fashion-mnist --held-out 5000 --images 12000 --budgets 25% \
    --search-epochs 2 --epochs 1 [--searches calibrated published] [--settings ...] [--json FILE]

A search is `published` (convolutions of the attention's own weights, all gates open at first) or `calibrated` (repaired
candidates, gates from scores); `scores` decides without one. The architecture found is fine-tuned with the settings of
`spvit compress`, ending with the last weights, from the host's weights repaired for it, as that command does, and with
--starts search from those of the search. Other options are those of fashion_mnist.py.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from accelerate.utils import set_seed
from cases import Case, make_case_parser, open_case
from rich.console import Console
from rich.table import Table
from spvit.initial_gates import initialise_gates
from torch import nn

import spvit
from fashion_mnist import own_settings, parse_options, settings_of
from reporting import check_free, summary, write_results
from spvit.architecture import Architecture
from spvit.train.deciding import CALIBRATION_IMAGES, calibration, searchable_for
from spvit.train.loop import Evaluation
from spvit.train.settings import SearchConfig

SEARCHES = ("published", "calibrated")
STARTS = ("host", "search")


@dataclass(frozen=True)
class Setting:
    """What differs from a search with the library's defaults."""

    config: dict[str, Any] = field(default_factory=dict)
    """Of SearchConfig."""
    length: float = 1.0
    """Epochs divided by those asked for."""
    momentum: float | None = None
    """Of the batch norms of the convolutions (fresh ones have 0.1)."""
    searches: tuple[str, ...] = SEARCHES
    """In which it makes a difference."""


PUBLISHED = ("published",)
SETTINGS = {
    "default": Setting(),
    **{
        f"constant weight {weight}": Setting({"budget_weight": float(weight), "budget_warmup": 0.0})
        for weight in (4, 13, 40, 130, 400)
    },
    "weight rising to 40": Setting({"budget_weight": 40.0}),
    "weight rising to 160": Setting({"budget_weight": 160.0}),
    "weight rising to 40 by half": Setting({"budget_weight": 40.0, "budget_warmup": 0.5}),
    "gate rate 0.01": Setting({"gate_learning_rate": 0.01}),
    "gate rate 0.2": Setting({"gate_learning_rate": 0.2}),
    "half as long": Setting(length=0.5),
    "twice as long": Setting(length=2.0),
    "four times as long": Setting(length=4.0),
    "rate 1e-4": Setting({"learning_rate": 1e-4}),
    "distilled": Setting({"distillation": 0.5}),
    "gates at 0.5": Setting({"gate_logit": 0.5}, searches=PUBLISHED),
    "gates at 3": Setting({"gate_logit": 3.0}, searches=PUBLISHED),
    "temperature 0.1": Setting({"temperature": 0.1}, searches=PUBLISHED),
    "temperature 1": Setting({"temperature": 1.0}, searches=PUBLISHED),
    "momentum 0.01": Setting(momentum=0.01),
    "momentum 0.3": Setting(momentum=0.3),
}


@dataclass(frozen=True)
class Row:
    """What one search gave; figures are None where its architecture could not be cut to the budget."""

    case: str
    seed: int
    budget: str
    search: str
    """Or `scores`."""
    setting: str
    start: str
    """Whose weights are fine-tuned: the host's, repaired, or the search's."""
    epochs: int
    """Of the search."""
    cost: float | None
    """MACs that the gates stand for at the end of the search, before FFNs are cut to the budget, by the dense ones."""
    summary: str
    pruned: Evaluation | None
    tuned: Evaluation | None


class Comparison:
    """A case at a budget, with what all searches of it share."""

    def __init__(self, case: Case, budget: str, options: argparse.Namespace) -> None:
        self.case, self.budget, self.options = case, budget, options
        self.calibrating = calibration(case.images, case.loop.seed, CALIBRATION_IMAGES)
        self._calibrated: nn.Module | None = None

    def rows(self) -> Iterator[Row]:
        """Yield what deciding without a search gives, and then every search under every setting that tells there."""
        yield self.by_scores()
        for search in self.options.searches:
            for name in self.options.settings:
                if search in SETTINGS[name].searches:
                    yield from self.by_search(search, name)

    def by_scores(self) -> Row:
        """Return what deciding without a search gives."""
        architecture = spvit.decide(
            self.case.dense, macs=self.budget, calibration=self.calibrating, multiple=self.case.multiple
        )
        return self._finished("scores", "", 0, None, architecture, None, "host")

    def by_search(self, search: str, name: str) -> list[Row]:
        """Return what a search under a setting gives, from every start asked for."""
        case, setting = self.case, SETTINGS[name]
        epochs = max(1, round(setting.length * self.options.search_epochs))
        config = SearchConfig(epochs=epochs, calibrated=search == "calibrated", **setting.config)
        net = self._searchable(config)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d) and setting.momentum is not None:
                module.momentum = setting.momentum
        loss = spvit.BudgetLoss(net, macs=self.budget, weight=config.budget_weight)
        case.train(net, config, loss)
        cost = loss.expected_cost().item() / loss.cost.dense
        try:
            architecture = spvit.decide(net, macs=self.budget, multiple=case.multiple)
        except spvit.BudgetError as error:
            failed = (case.name, case.loop.seed, self.budget, search, name)
            return [Row(*failed, start, epochs, cost, str(error), None, None) for start in self.options.starts]
        return [self._finished(search, name, epochs, cost, architecture, net, start) for start in self.options.starts]

    def _searchable(self, config: SearchConfig) -> nn.Module:
        """Return the network to search; scores of repaired candidates are taken once."""
        case = self.case
        set_seed(case.loop.seed)
        if not config.calibrated:
            return searchable_for(case.dense, config, case.multiple, None)
        if self._calibrated is None:
            net = searchable_for(case.dense, config, case.multiple, self.calibrating)
            initialise_gates(net, case.dense, macs=self.budget, calibration=self.calibrating)
            self._calibrated = net
        return copy.deepcopy(self._calibrated)

    def _finished(
        self,
        search: str,
        setting: str,
        epochs: int,
        cost: float | None,
        architecture: Architecture,
        net: nn.Module | None,
        start: str,
    ) -> Row:
        case = self.case
        if start == "search":
            model = spvit.prune(case.dense, architecture, weights=net)
        else:
            model = spvit.prune(case.dense, architecture, repair=self.calibrating)
        pruned = case.figures(model)
        tuned = case.train(model, own_settings(self.options.epochs))
        words = summary(architecture)
        return Row(case.name, case.loop.seed, self.budget, search, setting, start, epochs, cost, words, pruned, tuned)


def measured(options: argparse.Namespace, console: Console) -> list[Row]:
    """Return the rows of all seeds and budgets, and print each as it comes."""
    rows: list[Row] = []
    for seed in options.seeds:
        case = open_case(options, seed, console)
        for budget in options.budgets:
            for row in Comparison(case, budget, options).rows():
                figures = f"{percent(row.pruned)}, tuned {percent(row.tuned)}"
                text = f"seed {seed} {budget} {row.search} {row.setting} {row.start}: {row.summary}; {figures}"
                console.print(text, highlight=False, soft_wrap=True)
                rows.append(row)
                write(options, rows)
    return rows


def percent(figures: Evaluation | None) -> str:
    """Return accuracy and cross entropy."""
    return "-" if figures is None else f"{figures.accuracy:.2%} {figures.loss:.4f}"


def means(figures: Sequence[Evaluation | None]) -> str:
    """Return mean accuracy and cross entropy of those that there are, and how many of all these are if some miss."""
    known = [item for item in figures if item is not None]
    if not known:
        return "-"
    text = f"{mean(item.accuracy for item in known):.2%} {mean(item.loss for item in known):.4f}"
    return text if len(known) == len(figures) else f"{text} ({len(known)} of {len(figures)})"


def table_of(rows: list[Row]) -> Table:
    """Return a setting a row, means over the seeds."""
    table = Table(
        title="searches; accuracy and cross entropy after pruning and after fine-tuning, means over the seeds"
    )
    for name in ("budget", "search", "setting", "from", "epochs", "gates cost", "attention", "pruned", "tuned"):
        table.add_column(name)
    groups = dict.fromkeys((row.budget, row.search, row.setting, row.start, row.epochs) for row in rows)
    for key in groups:
        own = [row for row in rows if (row.budget, row.search, row.setting, row.start, row.epochs) == key]
        costs = [row.cost for row in own if row.cost is not None]
        # Blocks of all seeds that keep attention, become convolutions, and lose the layer.
        words = [word for row in own if row.pruned is not None for word in row.summary.split()]
        kinds = "/".join(str(sum(word.startswith(first) for word in words)) for first in ("m", "c", "-"))
        figures = means([row.pruned for row in own]), means([row.tuned for row in own])
        table.add_row(*map(str, key), f"{mean(costs):.1%}" if costs else "", kinds, *figures)
    return table


def write(options: argparse.Namespace, rows: list[Row]) -> None:
    """Write what there is so far."""
    plain = [
        {**vars(row), **{name: value and vars(value) for name, value in (("pruned", row.pruned), ("tuned", row.tuned))}}
        for row in rows
    ]
    write_results(options.json, "search_settings", plain, anew=True, settings=settings_of(options))


def main() -> None:
    """Search under every setting, writing the rows as they come, and print a table."""
    parser = make_case_parser(__doc__)
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES), help="(default: both)")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="(default: all)")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=["host"], help="(default: %(default)s)")
    options = parse_options(parser)
    check_free(options.json)
    console = Console(width=180)
    rows = measured(options, console)
    console.print(table_of(rows))


if __name__ == "__main__":
    main()
