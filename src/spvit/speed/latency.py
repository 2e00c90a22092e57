"""Latency budgets: what each choice saves on this machine, and decisions that are measured until they land.

Savings are measured on whole networks: the dense one takes turns with one in which all sites of a shape keep the same.
They do not quite add up, so they are scaled until those of the best choices together are what the smallest network
saves, which is measured too. A decision by these costs is built and measured beside the dense network, and what it
misses the budget by moves the target of the next one.

Of narrow attention two layers are measured, and of FFNs the narrowest: between them time goes with the MACs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spvit.architecture import DEFAULT_MULTIPLE, FFN, KINDS, REPAIRED, Architecture, Attention, Block, dense
from spvit.budget import TOLERANCE_MEASURED, Budget, in_words
from spvit.checkpoint import write_text
from spvit.cost import AttentionCost, BlockCost, NetworkCost
from spvit.errors import BudgetError, CalibrationError
from spvit.fields import from_file
from spvit.hosts.host import Host, check_values
from spvit.hosts.sites import BlockSites
from spvit.hosts.walk import Report, evaluating
from spvit.repair.choose import check_reachable, decide_by_scores
from spvit.repair.constraints import Constraints
from spvit.repair.scores import Scores
from spvit.replacements.costs import network_costs
from spvit.replacements.install import has_prefix
from spvit.speed.benchmark import Program, measure_latencies
from spvit.surgery import fold, prune

AT_ONCE, SECONDS, CALM_TRIES = 3, 0.3, 3
"""Networks that take turns with the dense one, the time for each, and how often noise has them measured again."""
DECISIONS = 8
"""Networks that are tried until one lands on the budget."""
FORMAT, VERSION = "spvit-latency-table", 1

logger = logging.getLogger("spvit")


@dataclass(frozen=True)
class Timing:
    """The time of a pass of a whole network, and of the dense one in turns with it."""

    ns: int
    dense_ns: int
    spread: float
    """Interquartile range of the rounds relative to the median, of the noisier of the two."""

    def __str__(self) -> str:
        own, whole = (in_words("latency", ns) for ns in (self.ns, self.dense_ns))
        return f"{own}, {self.ns / self.dense_ns:.1%} of the dense network's {whole} (spread {self.spread:.1%})"


@dataclass(frozen=True)
class LatencyTable:
    """What was measured of a model on a machine: any number of latency budgets follow from it."""

    setting: dict[str, Any]
    """The model (its shape), device, dtype, batch, threads and version of torch."""
    cost: NetworkCost
    """In nanoseconds of one pass of a batch; the fixed part is the smallest network's."""
    networks: dict[str, Timing] = field(default_factory=dict)
    """Whole networks by what they keep; what a decision measures is added, so that it is never measured again."""

    def check(self, host: Host, batch: int | None = None) -> None:
        """Raise CalibrationError unless the table is of this host, device and setting, and of a batch if one counts."""
        for name, found in _setting(host, batch or self.setting["batch"]).items():
            if (own := self.setting.get(name)) != found:
                raise CalibrationError(
                    f"the latency table is of {name} {own}, but here it is {found}; measure anew with "
                    "spvit.measure(host), or use the setting that it is of"
                )

    def save(self, path: str | Path) -> None:
        """Write the table to a JSON file, which is replaced if it exists."""
        write_text(Path(path), json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}) + "\n")

    @staticmethod
    def load(path: str | Path) -> LatencyTable:
        """Read a table. Raises CalibrationError naming the file when it is missing or damaged."""
        try:
            return from_file(LatencyTable, path, FORMAT, VERSION)
        except (OSError, ValueError) as error:
            raise CalibrationError(
                f"{path} holds no latency table that can be read ({error}); make one with spvit.measure(host)"
            ) from error

    def timing(self, host: Host, architecture: Architecture) -> Timing:
        """Return the time of what a host is pruned to: as it was measured before, or measured now."""
        blocks = ((block, "" if block.tokens == "all" else " prefix") for block in architecture.blocks)
        name = ", ".join(f"{block.attention} {len(block.ffn.units)}{tokens}" for block, tokens in blocks)
        if name not in self.networks:
            [self.networks[name]] = _timed(host, [architecture], self.setting["batch"])
        return self.networks[name]


def measure(host: nn.Module | Host, batch: int = 1, *, report: Report | None = None) -> LatencyTable:
    """Return what each choice takes of a model's latency on this machine, once for any number of budgets.

    Args:
        host: the dense model, on the device and in the dtype that count; its weights do not. It stays as it is.
        batch: images in one pass.
        report: called with ("latency", runs done, runs, {}) after each run, of a few networks in turns.

    Raises:
        BudgetError: the batch is not 1 or more.
        UnsupportedHostError: the model's family, or a part of it, is not known.
    """
    host = Host.of(host)
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise BudgetError(f"batch is {batch!r}, expected 1 image or more")
    check_values(next(host.model.parameters()))
    whole = Architecture(dense([block.ffn.units for block in host.blocks]).blocks, *REPAIRED)
    macs, shapes = network_costs(host)["macs"].blocks, _alike(host)
    tried = [(shape, choice) for shape in shapes for choice in _choices(host.blocks[shape[0]])]
    if has_prefix(host.blocks[-1].attention):
        tried.append(([len(host.blocks) - 1], replace(whole.blocks[-1], tokens="prefix")))
    saved: list[dict[Block, float]] = [{kept: 0.0} for kept in whole.blocks]
    dense_ns: list[int] = []
    runs = range(0, len(tried), AT_ONCE)
    for done, start in enumerate(runs, 1):
        some = tried[start : start + AT_ONCE]
        changed = [
            replace(whole, blocks=tuple(choice if index in shape else kept for index, kept in enumerate(whole.blocks)))
            for shape, choice in some
        ]
        for (shape, choice), timing in zip(some, _timed(host, changed, batch)):
            dense_ns.append(timing.dense_ns)
            for index in shape:
                saved[index][choice] = (1 - timing.ns / timing.dense_ns) / len(shape)
        if report is not None:
            report("latency", done, len(runs), {})
    found = [_Saved.of(own) for own in saved]
    least = [Block(max(own.attention, key=own.attention.__getitem__), own.narrowest) for own in found]
    [smallest] = _timed(host, [replace(whole, blocks=tuple(least))], batch)
    share, whole_ns = min(1.0, smallest.ns / smallest.dense_ns), round(statistics.median(dense_ns))
    most = sum(max(own.attention.values()) + own.ffn for own in found)
    blocks = tuple(own.cost(like, whole_ns * (1 - share) / max(most, 1e-9)) for own, like in zip(found, macs))
    more = f"(spvit.measure(host, batch={8 * batch}), --latency-batch {8 * batch}) often gains more"
    taken = f"takes {share:.0%} of the dense one's {in_words('latency', whole_ns)}; a larger batch {more}"
    note = f"at batch {batch} the smallest network, measured, {taken}"
    fixed = whole_ns - sum(block.dense for block in blocks)
    return LatencyTable(_setting(host, batch), NetworkCost("latency", fixed, blocks, note))


def decide_by_latency(
    host: Host,
    scores: Scores,
    budget: Budget,
    table: LatencyTable,
    multiple: int | None,
    constraints: Constraints,
) -> Architecture:
    """Return the architecture with the least sum of scores whose latency, measured, is within 3 % of a budget.

    A share is one of the dense network's latency in the same run. Decisions with the same table are the same.

    Raises:
        BudgetError: the budget cannot be reached; names what was measured nearest to it.
    """
    dense_ns, tried = table.cost.dense, {}  # type: int, dict[Architecture, tuple[int, Timing]]
    wanted = target = check_reachable(host, budget, multiple, constraints, scores.blocks, scores.objective, table.cost)
    for _ in range(DECISIONS):
        limit = Budget("latency", amount=min(target, dense_ns))
        try:
            architecture = decide_by_scores(host, scores, limit, multiple, constraints, table.cost)
        except BudgetError:
            if not tried:
                raise
            break  # by the table nothing is faster; what was measured says how near that is
        if architecture in tried:
            break
        timing = table.timing(host, architecture)
        found = timing.ns if budget.fraction is None else round(timing.ns / timing.dense_ns * dense_ns)
        tried[architecture] = (found, timing)
        if abs(found - wanted) <= TOLERANCE_MEASURED * wanted:
            break
        target += wanted - found
    architecture, (found, timing) = min(tried.items(), key=lambda item: abs(item[1][0] - wanted))
    if timing.spread > TOLERANCE_MEASURED:
        advice = "the budget is met no better than that; end other programs and measure again, or take a larger batch"
        logger.warning("latency is noisy here: %s; %s", timing, advice)
    if abs(found - wanted) > max(TOLERANCE_MEASURED, timing.spread) * wanted:
        raise BudgetError(
            f"no architecture was measured within {TOLERANCE_MEASURED:.0%} of {in_words('latency', wanted)} "
            f"({wanted / dense_ns:.1%}); the nearest takes {timing}; ask for that"
        )
    return architecture


def batches_to_measure(batches: Sequence[int], asked: int | None) -> list[int]:
    """Return the batch sizes at which a pruned model is measured: that of a latency budget, if any, is the first."""
    return [*dict.fromkeys([*([] if asked is None else [asked]), *batches])]


def _setting(host: Host, batch: int) -> dict[str, Any]:
    """Return what latency depends on, beside what is kept."""
    parameter = next(host.model.parameters())
    shapes = [(name, list(own.shape)) for name, own in host.model.named_parameters()]
    about = f"{type(host.model).__name__} {host.input_size} {shapes}"
    return {
        "model": hashlib.sha256(about.encode()).hexdigest()[:16],
        "device": _device_name(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "batch": batch,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if device.type == "cpu" and info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, f"{device.type} {platform.machine()}")


def _timed(host: Host, architectures: Sequence[Architecture], batch: int) -> list[Timing]:
    """Return the times of what a host is pruned to, in turns with the dense network; of noisy tries the calmest."""
    best: list[Timing] = []
    with evaluating(host.model):
        pruned: list[nn.Module] = [fold(prune(host, one), inplace=True).eval() for one in architectures]
        weight = next(host.model.parameters())
        where = (host.input_size, weight.device.type, weight.dtype)
        programs = [Program("", model, *where) for model in (host.model, *pruned)]
        for _ in range(CALM_TRIES):
            own, *others = measure_latencies(programs, batch, SECONDS)
            spreads = [max(one.spread_ms / one.latency_ms for one in (own, other)) for other in others]
            dense_ns = 1e6 * own.latency_ms
            found = [
                Timing(round(dense_ns / other.speed_up), round(dense_ns), round(spread, 4))
                for other, spread in zip(others, spreads)
            ]
            best = [min(pair, key=lambda timing: timing.spread) for pair in zip(best or found, found)]
            if max(timing.spread for timing in best) <= TOLERANCE_MEASURED:
                break
    return best


@dataclass(frozen=True)
class _Saved:
    """Which share of the dense network's time the choices of a block save."""

    attention: dict[Attention, float]
    narrowest: FFN
    ffn: float
    """By the narrowest FFN."""
    prefix: float | None

    @staticmethod
    def of(saved: Mapping[Block, float]) -> _Saved:
        """Sort what each choice saves by what it changes."""
        prefix = next((own for kept, own in saved.items() if kept.tokens == "prefix"), None)
        narrow = min(saved, key=lambda kept: len(kept.ffn.units))
        others = {kept.attention: own for kept, own in saved.items() if kept != narrow and kept.tokens == "all"}
        return _Saved(others, narrow.ffn, max(0.0, saved[narrow]), prefix)

    def cost(self, macs: BlockCost, scale: float) -> BlockCost:
        """Return the costs of a block, as those of its MACs between what was measured, times a scale."""
        costs = {kept: round(scale * (max(self.attention.values()) - own)) for kept, own in self.attention.items()}
        kinds = {kept.kind: AttentionCost(cost) for kept, cost in costs.items() if not kept.narrowed()}
        narrow = sorted((macs.attention(kept), cost) for kept, cost in costs.items() if kept.narrowed())
        if narrow:
            (few, least), (many, most), like = narrow[0], narrow[-1], macs.kinds["msa"]
            slope = max(0.0, (most - least) / max(1, many - few))
            query_key, value, rest = slope * like.query_key, slope * like.value, max(0.0, least - slope * few)
            kinds["msa"] = AttentionCost(costs[Attention()], round(query_key), round(value), round(rest))
        unit = round(scale * self.ffn / max(1, macs.units - len(self.narrowest.units)))
        cost = BlockCost(kinds, unit, macs.units, macs.heads, macs.head_width)
        if self.prefix is None:
            return cost
        left = max(0, cost.dense - round(scale * self.prefix))
        alone = {"msa": AttentionCost(left, rest=left), "skip": AttentionCost(0)}
        return replace(cost, prefix_only=replace(cost, kinds=alone, unit=0))


def _alike(host: Host) -> list[list[int]]:
    """Return the indices of blocks whose choices cost the same, together."""
    costs, shapes = network_costs(host).values(), {}  # type: Any, dict[str, list[int]]
    for index in range(len(host.blocks)):
        own = [replace(cost.blocks[index], prefix_only=None) for cost in costs]
        shapes.setdefault(repr(own), []).append(index)
    return [*shapes.values()]


def _choices(sites: BlockSites) -> list[Block]:
    """Return what is measured of a block: other attention with the whole FFN, and the narrowest FFN."""
    site, units = sites.attention, sites.ffn.units
    forms = [Attention(kind) for kind in list(KINDS)[1:]]
    for heads, divisor in ((site.heads, 2), (1, 4)):
        rank = max(2, site.head_width // divisor // 2 * 2)
        queries, values = (
            rank if may and rank < site.head_width else None for may in (site.narrows_queries, site.narrows_values)
        )
        some = tuple(range(heads)) if site.narrows_values and heads < site.heads else None
        forms.append(Attention("msa", some, queries, values))
    choices = [Block(kept, FFN.whole(units)) for kept in dict.fromkeys(forms) if kept != Attention()]
    return [*choices, Block(Attention(), FFN(units, tuple(range(min(DEFAULT_MULTIPLE, max(1, units // 2))))))]
