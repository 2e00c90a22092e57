"""Fine-tuning of a repaired network under several settings and lengths: digits, or Fashion-MNIST.

python benchmarks/finetune_settings.py --seeds 0 1 --budgets 25% --lengths 1 5 20 [--settings ...] [--json FILE]
python benchmarks/finetune_settings.py --data-set fashion-mnist --held-out 5000 --dense-epochs 5 --images 12000 \
    --budgets 25% --lengths 1 [--settings ...] [--json FILE]

What keeps its best weights chooses them on every other one of the validation images; all figures are of the others.
Other options are those of fashion_mnist.py.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from cases import Case, make_case_parser, open_case
from rich.console import Console
from rich.table import Table
from torch.utils.data import Subset

import spvit
from fashion_mnist import own_settings, parse_options, settings_of
from reporting import check_free, write_results
from spvit.train.deciding import CALIBRATION_IMAGES, calibration
from spvit.train.loop import Evaluation

FALLING = {"minimum_learning_rate": 1e-5, "averaging_epochs": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "last": {},
    "falling rate 5e-4": FALLING,
    "falling rate 2e-4": {**FALLING, "learning_rate": 2e-4},
    "falling rate 1e-4": {**FALLING, "learning_rate": 1e-4},
    "falling rate 5e-5": {**FALLING, "learning_rate": 5e-5},
    "falling rate 5e-4, average": {"minimum_learning_rate": 1e-5},
    "falling rate 2e-4, average": {"minimum_learning_rate": 1e-5, "learning_rate": 2e-4},
    "distillation 0.9": {"distillation": 0.9},
    "average of half an epoch": {"averaging_epochs": 0.5},
    "average of 2 epochs": {"averaging_epochs": 2.0},
    "rate 1e-3": {"learning_rate": 1e-3, "minimum_learning_rate": 1e-3},
    "rate 2e-4": {"learning_rate": 2e-4, "minimum_learning_rate": 2e-4},
    "best": {"keep_best": True},
}
"""What differs from the fine-tuning settings of `spvit compress` and ending with the last weights."""


@dataclass(frozen=True)
class Row:
    """What one setting gave, on images that neither training nor the choice of weights has seen."""

    case: str
    seed: int
    budget: str
    setting: str
    epochs: int
    repaired: Evaluation
    trained: Evaluation


def compare(case: Case, budget: str, names: list[str], lengths: list[int]) -> list[Row]:
    """Return the rows of all settings and lengths, from one repaired network."""
    unseen: Any = case.images.validation
    choosing, reporting = (
        replace(case, images=replace(case.images, validation=Subset(unseen, range(start, len(unseen), 2))))
        for start in (0, 1)
    )
    images = calibration(case.images, case.loop.seed, CALIBRATION_IMAGES)
    architecture = spvit.decide(case.dense, macs=budget, calibration=images, multiple=case.multiple)
    repaired = spvit.prune(case.dense, architecture, repair=images)
    before, rows = reporting.figures(repaired), []
    for name in names:
        for epochs in lengths:
            model = copy.deepcopy(repaired)
            choosing.train(model, replace(own_settings(epochs), **SETTINGS[name]))
            rows.append(Row(case.name, case.loop.seed, budget, name, epochs, before, reporting.figures(model)))
            print(name, epochs, rows[-1].trained, flush=True)
    return rows


def table_of(rows: list[Row], lengths: list[int]) -> Table:
    """Return a setting a row: accuracy and cross entropy by length, means over the seeds, the repaired one first."""
    table = Table(title="accuracy and cross entropy by epochs of fine-tuning, 0: repaired; means over the seeds")
    for name in ("budget", "setting", "0", *(str(epochs) for epochs in lengths)):
        table.add_column(name)
    for budget, setting in dict.fromkeys((row.budget, row.setting) for row in rows):
        own = [row for row in rows if (row.budget, row.setting) == (budget, setting)]
        figures = [[row.repaired for row in own]] + [[row.trained for row in own if row.epochs == n] for n in lengths]
        cells = [f"{mean(f.accuracy for f in some):.2%} {mean(f.loss for f in some):.4f}" for some in figures]
        table.add_row(budget, setting, *cells)
    return table


def main() -> None:
    """Measure every setting at every length, print a table, and write the rows."""
    parser = make_case_parser(__doc__, [1, 5, 20])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="(default: all)")
    options = parse_options(parser)
    check_free(options.json)
    console, rows = Console(width=160), []
    for seed in options.seeds:
        case = open_case(options, seed, console)
        for budget in options.budgets:
            rows += compare(case, budget, options.settings, options.lengths)
    console.print(table_of(rows, options.lengths))
    plain = [{**vars(row), "repaired": vars(row.repaired), "trained": vars(row.trained)} for row in rows]
    write_results(options.json, "finetune_settings", plain, settings=settings_of(options))


if __name__ == "__main__":
    main()
