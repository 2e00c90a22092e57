"""Latency budgets: what each choice saves on this machine, and decisions that are measured until they land.

Savings are measured on whole networks: the dense one takes turns with one in which all sites of a shape keep the same.
They do not quite add up, so they are scaled until those of the best choices together are what the smallest network
saves, which is measured too. A decision by these costs is built and measured beside the dense network, and what it
misses the budget by moves the target of the next one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from spvit.architecture import DEFAULT_MULTIPLE, FFN, KINDS, REPAIRED, Architecture, Attention, Block, dense
from spvit.benchmark import Program, measure_latencies
from spvit.budget import TOLERANCE_MEASURED, Budget, in_words
from spvit.checkpoint import write_text
from spvit.cost import AttentionCost, BlockCost, NetworkCost
from spvit.errors import BudgetError, CalibrationError
from spvit.hosts.host import Host, check_values
from spvit.hosts.sites import AttentionSite, BlockSites
from spvit.hosts.walk import Report, evaluating
from spvit.repair.choose import check_reachable, decide_by_scores
from spvit.repair.constraints import Constraints
from spvit.repair.scores import Scores
from spvit.replacements.costs import network_costs
from spvit.replacements.install import has_prefix
from spvit.surgery import fold, prune

SHARES = (1 / 16, 1 / 4, 1 / 2, 3 / 4)
"""Of an FFN's units, at which it is measured, beside the narrowest."""
NARROW = ((1, 2, 2), (1, 4, 4), (1, 2, 1), (1, 1, 2), (2, 1, 1), (2, 4, 4), (8, 1, 1), (8, 4, 4))
"""What the heads, and the dimensions of queries and of values, are divided by in narrow attention that is measured."""
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
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if (data["format"], data["version"]) != (FORMAT, VERSION):
                raise ValueError(f'expected "format": "{FORMAT}", "version": {VERSION}')
            blocks = tuple(map(_block_from_dict, data["cost"]["blocks"]))
            networks = {name: Timing(**timing) for name, timing in data["networks"].items()}
            return LatencyTable(data["setting"], NetworkCost(**{**data["cost"], "blocks": blocks}), networks)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise CalibrationError(
                f"{path} holds no latency table that can be read ({reason}); make one with spvit.measure(host)"
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
    shapes = _alike(host)
    tried = [(shape, choice) for shape in shapes for choice in _choices(host.blocks[shape[0]])]
    if has_prefix(host.blocks[-1].attention):
        tried.append(([len(host.blocks) - 1], replace(whole.blocks[-1], tokens="prefix")))
    timings: list[Timing] = []
    starts = range(0, len(tried), AT_ONCE)
    for done, start in enumerate(starts, 1):
        networks = [_with(whole, *change) for change in tried[start : start + AT_ONCE]]
        timings += _timed(host, networks, batch)
        if report is not None:
            report("latency", done, len(starts) + 1, {})
    saved: list[dict[Block, float]] = [{whole.blocks[index]: 0.0} for index in range(len(host.blocks))]
    for (shape, choice), timing in zip(tried, timings):
        for index in shape:
            saved[index][choice] = (1 - timing.ns / timing.dense_ns) / len(shape)
    best = [(max(_attention(own), key=_attention(own).__getitem__), min(_widths(own))) for own in saved]
    blocks = [Block(kept, _first(own.ffn.units, width)) for own, (kept, width) in zip(host.blocks, best)]
    [least] = _timed(host, [replace(whole, blocks=tuple(blocks))], batch)
    if report is not None:
        report("latency", len(starts) + 1, len(starts) + 1, {})
    dense_ns = round(float(np.median([timing.dense_ns for timing in timings])))
    fixed = min(dense_ns, round(least.ns / least.dense_ns * dense_ns))
    most = sum(max(_attention(own).values()) + max(_widths(own).values()) for own in saved)
    scale = (dense_ns - fixed) / max(most, 1e-9)
    costs = tuple(_block_cost(sites, own, scale) for sites, own in zip(host.blocks, saved))
    note = (
        f"at batch {batch} the smallest network, measured, takes {fixed / dense_ns:.0%} of the dense one's "
        f"{in_words('latency', dense_ns)}; a larger batch (spvit.measure(host, batch={8 * batch}), "
        f"--latency-batch {8 * batch}) often gains more"
    )
    return LatencyTable(_setting(host, batch), NetworkCost("latency", fixed, costs, note))


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
    wanted = target = check_reachable(
        host, budget, multiple, constraints, scores.blocks, scores.objective or "auto", table.cost
    )
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


def _alike(host: Host) -> list[list[int]]:
    """Return the indices of blocks whose choices cost the same, together."""
    costs = network_costs(host).values()
    shapes: list[tuple[Any, list[int]]] = []
    for index in range(len(host.blocks)):
        own = [replace(cost.blocks[index], prefix_only=None) for cost in costs]
        same = next((indices for shape, indices in shapes if shape == own), None)
        if same is None:
            shapes.append((own, [index]))
        else:
            same.append(index)
    return [indices for _, indices in shapes]


def _with(architecture: Architecture, indices: Sequence[int], kept: Block) -> Architecture:
    """Return an architecture that keeps the same of several blocks."""
    return replace(
        architecture,
        blocks=tuple(kept if index in indices else block for index, block in enumerate(architecture.blocks)),
    )


def _first(units: int, width: int) -> FFN:
    return FFN(units, tuple(range(width)))


def _choices(sites: BlockSites) -> list[Block]:
    """Return what is measured of a block: other attention with the whole FFN, and narrower FFNs."""
    site, units = sites.attention, sites.ffn.units
    forms = [Attention(kind) for kind in list(KINDS)[1:]]
    for by_heads, *divisors in NARROW:
        heads = max(1, site.heads // by_heads)
        ranks = [max(2, site.head_width // by // 2 * 2) for by in divisors]
        may = (site.narrows_queries, site.narrows_values)
        kept_heads = tuple(range(heads)) if site.narrows_values and heads < site.heads else None
        kept = (rank if own and rank < site.head_width else None for rank, own in zip(ranks, may))
        forms.append(Attention("msa", kept_heads, *kept))
    step = min(DEFAULT_MULTIPLE, max(1, units // 2))
    widths = {step, *(max(step, round(share * units / step) * step) for share in SHARES)} - {units}
    choices = [Block(kept, FFN.whole(units)) for kept in dict.fromkeys(forms) if kept != Attention()]
    return choices + [Block(Attention(), _first(units, width)) for width in sorted(widths)]


def _attention(saved: Mapping[Block, float]) -> dict[Attention, float]:
    """Return what other attention saves, of what choices of a block save."""
    return {
        choice.attention: own
        for choice, own in saved.items()
        if len(choice.ffn.units) == choice.ffn.width and choice.tokens == "all"
    }


def _widths(saved: Mapping[Block, float]) -> dict[int, float]:
    """Return what narrower FFNs save, by width ascending."""
    return {
        width: own
        for width, own in sorted(
            (len(choice.ffn.units), own)
            for choice, own in saved.items()
            if choice.attention == Attention() and choice.tokens == "all"
        )
    }


def _block_cost(sites: BlockSites, saved: Mapping[Block, float], scale: float) -> BlockCost:
    """Return the costs of a block from what its choices save, times a scale."""
    site, attention, widths = sites.attention, _attention(saved), _widths(saved)
    costs = {kept: round(scale * (max(attention.values()) - own)) for kept, own in attention.items()}
    kinds = {kept.kind: AttentionCost(cost) for kept, cost in costs.items() if not kept.narrowed()}
    narrow = {kept: cost for kept, cost in costs.items() if kept.narrowed()}
    if narrow:
        kinds["msa"] = _narrow_cost(site, costs[Attention()], narrow)
    rising = itertools.accumulate((round(scale * (max(widths.values()) - own)) for own in widths.values()), max)
    cost = BlockCost(kinds, 0, sites.ffn.units, site.heads, site.head_width, widths=dict(zip(widths, rising)))
    prefix = [own for choice, own in saved.items() if choice.tokens == "prefix"]
    if not prefix:
        return cost
    left = max(0, cost.dense - round(scale * prefix[0]))
    alone = {"msa": AttentionCost(left, rest=left), "skip": AttentionCost(0)}
    return replace(cost, prefix_only=replace(cost, kinds=alone, widths={cost.units: 0}))


def _narrow_cost(site: AttentionSite, whole: int, narrow: Mapping[Attention, int]) -> AttentionCost:
    """Return the cost of attention, fitted to that of narrow layers by least squares with no part below zero."""
    rows = []
    for kept in narrow:
        heads = site.heads if kept.heads is None else len(kept.heads)
        query_key, value = kept.query_key_rank or site.head_width, kept.value_rank or site.head_width
        rows.append([1.0, heads, heads * query_key, heads * value, query_key != value])
    features = np.array(rows, dtype=float)
    free, parts = np.ones(features.shape[1], dtype=bool), np.zeros(features.shape[1])
    while free.any():
        parts = np.zeros(len(free))
        parts[free] = np.linalg.lstsq(features[:, free], np.array([*narrow.values()], dtype=float), rcond=None)[0]
        if (parts >= 0).all():
            break
        free[(parts * features.max(0)).argmin()] = False
    rest, head, query_key, value, uneven = (round(float(part)) for part in parts)
    return AttentionCost(whole, query_key, value, rest, head, uneven=uneven)


def _block_from_dict(data: Any) -> BlockCost:
    kinds = {kind: AttentionCost(**own) for kind, own in data["kinds"].items()}
    widths = {int(width): own for width, own in data["widths"].items()}
    alone = None if data["prefix_only"] is None else _block_from_dict(data["prefix_only"])
    return BlockCost(**{**data, "kinds": kinds, "widths": widths, "prefix_only": alone})
