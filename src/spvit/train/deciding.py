"""How a run decides what to keep: by a search, or by scores from calibration images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import set_seed
from torch import Tensor, nn

from spvit.architecture import Architecture
from spvit.budget import TOLERANCE, Budget, check_multiple, human
from spvit.checkpoint import write_text
from spvit.decide import decide
from spvit.errors import BudgetError, DataError
from spvit.hosts.host import Host
from spvit.hosts.recognise import family_of
from spvit.replacements.costs import network_costs
from spvit.search.budget_loss import BudgetLoss
from spvit.search.network import make_searchable
from spvit.train.data import Images
from spvit.train.loaders import training_loader
from spvit.train.loop import STATE, Phase, run_phase
from spvit.train.processes import processes
from spvit.train.progress import PhaseProgress
from spvit.train.settings import LoopConfig, SearchConfig

ARCHITECTURE = "architecture.json"
CALIBRATION_IMAGES = 1024


def searchable_for(host: nn.Module, phase: SearchConfig) -> nn.Module:
    """Return the searchable network that a search's settings ask for; the dense host stays as it is."""
    return make_searchable(host, temperature=phase.temperature, gate_logit=phase.gate_logit)


def search(
    host: nn.Module,
    images: Images,
    budget: dict[str, str | int],
    folder: Path,
    config: LoopConfig,
    phase: SearchConfig,
    progress: PhaseProgress,
    multiple: int | None = None,
) -> tuple[nn.Module, Architecture]:
    """Search a host for what to keep; write architecture.json; return the searched network and the architecture.

    Args:
        host: the dense model; it stays as it is.
        images: training and validation images.
        budget: `{"macs": "50%"}` or `{"params": ...}`.
        folder: the run folder.
        config: settings of the run.
        phase: settings of the search.
        progress: where to show progress.
        multiple: FFN widths and ranks are multiples of it.
    """
    set_seed(config.seed)
    net = searchable_for(host, phase)
    loss = BudgetLoss(net, weight=phase.budget_weight, budget=Budget.parse(**budget))
    teacher = host if phase.distillation > 0 else None
    run_phase(Phase("search", net, phase, loss, teacher), images, folder, config, progress)
    architecture = decide(net, multiple=multiple, macs=budget.get("macs"), params=budget.get("params"))
    _write(architecture, folder)
    return net, architecture


def check_decision(host: nn.Module, budget: dict[str, str | int], multiple: int | None) -> None:
    """Refuse what cannot be decided, before anything is computed.

    Args:
        host: the dense model.
        budget: `{"macs": "50%"}` or `{"params": ...}`.
        multiple: of FFN widths and ranks.

    Raises:
        NotSearchableError, UnsupportedHostError: the model is not a dense host of a supported family.
        BudgetError: the budget or the multiple is malformed, or the budget is out of reach.
    """
    Host.of(host)
    check_multiple(multiple)
    parsed = Budget.parse(**budget)
    parsed.target(network_costs(host)[parsed.metric])


def check_calibration_images(count: int) -> None:
    """Raise DataError unless there is a calibration image."""
    if count < 1:
        raise DataError(f"calibration_images is {count}, expected 1 or more")


def calibration(images: Images, seed: int, count: int) -> list[Tensor]:
    """Return the first so many training images of a run's seed as batches [B, channels, height, width].

    Raises:
        DataError: an image cannot be read, or no image is asked for.
    """
    check_calibration_images(count)
    set_seed(seed)
    batches: list[Tensor] = []
    missing = count
    for batch, _ in training_loader(images):
        batches.append(batch[:missing])
        missing -= len(batches[-1])
        if missing == 0:
            break
    return batches


def decide_from_scores(
    host: nn.Module,
    images: Sequence[Tensor],
    budget: dict[str, str | int],
    folder: Path,
    multiple: int | None,
    progress: PhaseProgress,
) -> Architecture:
    """Return the architecture that calibration images choose, without a search; write architecture.json.

    A run that is continued keeps the one that it has written.

    Args:
        host: the dense model.
        images: calibration images, [B, channels, height, width] a batch.
        budget: `{"macs": "50%"}` or `{"params": ...}`.
        folder: the run folder.
        multiple: FFN widths and ranks are multiples of it; None as in `decide`.
        progress: where to show progress.
    """
    path = folder / ARCHITECTURE
    if path.is_file():
        architecture = Architecture.load(path)
        _check_written(architecture, host, budget, path)
        return architecture
    with _scoring(host, progress) as report:
        architecture = decide(
            host,
            macs=budget.get("macs"),
            params=budget.get("params"),
            multiple=multiple,
            calibration=images,
            report=report,
        )
    _write(architecture, folder)
    return architecture


def finetuned(folder: Path) -> bool:
    """Return whether fine-tuning has saved anything in a run folder."""
    return any((folder / STATE / "finetune").glob("*"))


def _write(architecture: Architecture, folder: Path) -> None:
    """Write architecture.json, unless weights of another one were fine-tuned in the folder already."""
    path = folder / ARCHITECTURE
    if finetuned(folder) and path.is_file() and Architecture.load(path) != architecture:
        raise DataError(
            f"{folder} has fine-tuned another architecture than what was found now; continue it with the settings that "
            "it was begun with, or name another folder"
        )
    if processes().is_main_process:
        write_text(path, architecture.to_json())


def _check_written(architecture: Architecture, host: nn.Module, budget: dict[str, str | int], path: Path) -> None:
    """Raise BudgetError when an architecture that a run has written is not of the budget that it is continued with."""
    parsed = Budget.parse(**budget)
    cost = network_costs(host)[parsed.metric]
    target, own = parsed.target(cost), cost.of(architecture)
    if abs(own - target) > TOLERANCE * target:
        raise BudgetError(
            f"{path} has {human(own)} {parsed.metric} ({own / cost.dense:.1%}), not the {human(target)} "
            f"({target / cost.dense:.1%}) asked for; continue its run with its own budget, or name another folder"
        )


@contextmanager
def _scoring(host: nn.Module, progress: PhaseProgress) -> Iterator[Callable[[int, int], object]]:
    """Show a bar while candidates are scored; it moves with what is given as the report."""
    progress.start("scores", len(family_of(host).blocks(host)), 0)
    try:
        yield lambda done, blocks: progress.step("")
    finally:
        progress.stop()
