"""What the tests of the command share: running it, refusals, a recipe of the digits, small models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from spvit.cli.main import main
from spvit.cost import NetworkCost
from spvit.replacements.costs import network_costs
from spvit.speed.benchmark import Latency, Program, measure_latencies
from spvit.surgery import pruned_record
from training import MODEL, MODEL_ARGS, micro_host

RECIPES = Path(__file__).parents[1] / "recipes"
DIGITS = {
    "model": MODEL,
    "model_args": MODEL_ARGS,
    "pretrained": False,
    "data": "digits",
    "images": {"batch_size": 128, "mean": [0.5], "std": [0.5], "crop": 1.0, "flip": 0.0},
}
SHORT = {"epochs": 1, "warmup_epochs": 0.0}
TINY = {
    "deit": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
    "swin": {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 4]},
    "digits": {"depth": 2, "num_classes": 10},
    "fashion": {"depth": 2, "num_classes": 2},
}
"""Arguments that make the models of the recipes small."""


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Return the exit code of a command and what it printed: output and problems."""
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], words: str, *arguments: str) -> None:
    """Assert that a command is refused in one line with these words, with exit code 2."""
    code, _, problems = run(capsys, *arguments)
    assert code == 2
    assert problems.startswith("spvit: ")
    assert len(problems.strip().splitlines()) == 1
    assert words in problems


def digits_recipe(folder: Path) -> Callable[..., str]:
    """Return a function that writes a recipe of the micro model on the digits, with more settings, and names it."""

    def write(**more: object) -> str:
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump({**DIGITS, **more}))
        return str(path)

    return write


def trained_weights(folder: Path) -> str:
    """Return a weights file that fits the micro model."""
    torch.save(micro_host().state_dict(), folder / "trained.pth")
    return str(folder / "trained.pth")


def measure_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure latencies in passing only; no test looks at them."""
    monkeypatch.setattr(
        "spvit.speed.benchmark.measure_latencies", lambda programs, *_: measure_latencies(programs, 1, 0.0)
    )


def time_by_macs(
    monkeypatch: pytest.MonkeyPatch, spread: float = 0.01, power: float = 0.8, ms: float = 1e-3
) -> list[int]:
    """Let MACs stand for time in latency budgets, a power of them so that savings do not add up.

    Returns the numbers of networks measured together, of which one is the dense network, as they are measured.
    """
    turns: list[int] = []
    costs: dict[Any, NetworkCost] = {}

    def measured(programs: Sequence[Program], batch: int, seconds: float) -> list[Latency]:
        turns.append(len(programs))
        host, *pruned = (program.run for program in programs)
        cost = costs.get(host) or network_costs(host)["macs"]
        costs[host] = cost
        macs = [cost.dense, *(cost.of(pruned_record(model).architecture) for model in pruned)]
        times = [ms * batch * own**power for own in macs]
        about = {"batch": batch, "device": "cpu", "dtype": "float32", "backend": "torch", "threads": 1, "repeats": 7}
        return [Latency(own, spread * own, 1000 / own, times[0] / own, (1.0, 1.0), False, **about) for own in times]

    monkeypatch.setattr("spvit.speed.latency.measure_latencies", measured)
    return turns
