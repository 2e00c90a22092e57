"""How a run decides what to keep: by a search, or by scores from calibration images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from accelerate.utils import set_seed
from torch import Tensor, nn

from spvit.architecture import Architecture
from spvit.budget import check_multiple, parse_budget
from spvit.decide import decide
from spvit.errors import DataError
from spvit.hosts import family_of
from spvit.hosts.base import network_costs
from spvit.surgery import check_dense, make_searchable
from spvit.train.data import Images
from spvit.train.loaders import training_loader
from spvit.train.loop import Phase, run_phase
from spvit.train.losses import BudgetLoss
from spvit.train.processes import processes
from spvit.train.progress import PhaseProgress
from spvit.train.run_folder import SEARCH, RunFolder
from spvit.train.settings import LoopConfig, SearchConfig

CALIBRATION_IMAGES = 1024


def searchable_for(host: nn.Module, phase: SearchConfig) -> nn.Module:
    """Return the searchable network that a search's settings ask for; the dense host stays as it is."""
    return make_searchable(host, temperature=phase.temperature, gate_logit=phase.gate_logit)


def search(
    host: nn.Module,
    images: Images,
    budget: dict[str, str | int],
    run: RunFolder,
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
        run: the run folder.
        config: settings of the run.
        phase: settings of the search.
        progress: where to show progress.
        multiple: FFN widths and ranks are multiples of it.
    """
    set_seed(config.seed)
    net = searchable_for(host, phase)
    loss = BudgetLoss(net, weight=phase.budget_weight, **budget)
    teacher = host if phase.distillation > 0 else None
    run_phase(Phase(SEARCH, net, phase, loss, teacher), images, run, config, progress)
    architecture = decide(net, multiple=multiple, macs=budget.get("macs"), params=budget.get("params"))
    return net, written(architecture, run)


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
    check_dense(host)
    check_multiple(multiple)
    parsed = parse_budget(**budget)
    parsed.target(network_costs(family_of(host), host)[parsed.metric])


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
    run: RunFolder,
    multiple: int | None,
    progress: PhaseProgress,
) -> Architecture:
    """Return the architecture that calibration images choose, without a search; write architecture.json.

    A run that is continued keeps the one that it has written.

    Args:
        host: the dense model.
        images: calibration images, [B, channels, height, width] a batch.
        budget: `{"macs": "50%"}` or `{"params": ...}`.
        run: the run folder.
        multiple: FFN widths and ranks are multiples of it; None as in `decide`.
        progress: where to show progress.
    """
    if run.architecture.is_file():
        parsed = parse_budget(**budget)
        cost = network_costs(family_of(host), host)[parsed.metric]
        run.check_architecture(cost, parsed.target(cost))
        return Architecture.load(run.architecture)
    with _scoring(host, progress) as report:
        architecture = decide(
            host,
            macs=budget.get("macs"),
            params=budget.get("params"),
            multiple=multiple,
            calibration=images,
            report=report,
        )
    return written(architecture, run)


def written(architecture: Architecture, run: RunFolder) -> Architecture:
    """Write architecture.json and return what it holds."""
    if processes().is_main_process:
        run.write_architecture(architecture)
    processes().wait_for_everyone()
    return Architecture.load(run.architecture)


@contextmanager
def _scoring(host: nn.Module, progress: PhaseProgress) -> Iterator[Callable[[int, int], object]]:
    """Show a bar while candidates are scored; it moves with what is given as the report."""
    progress.start("scores", len(family_of(host).blocks(host)), 0)
    try:
        yield lambda done, blocks: progress.step("")
    finally:
        progress.stop()
