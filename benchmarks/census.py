"""The census: every ViT-like model passes the short contract of a host, or is refused with a reason.

python benchmarks/census.py [--only PATTERN] [--jobs 2] [--limit 60] [--output docs/models.md] [--json FILE]

Every name of timm that `tiny_models` takes, and its classes of transformers, torchvision and vit-pytorch, are built
tiny with random weights in double precision. `spvit.recognise` finds the sites or refuses. What it takes goes through
the contract (the functions of CONTRACT below). A third outcome, `crash`, is a fault of spvit: the exit status is then
1. Names that are the same model at tiny size are each built, and one of them goes through the contract.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import logging
import math
import signal
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import spvit
import tiny_models
from census_page import Outcome, page
from spvit.architecture import FFN, Architecture, Attention, Block, dense
from spvit.hosts.rebuild import can_build, source_of
from spvit.hosts.sites import AttentionSite
from spvit.replacements.costs import network_costs
from timm_vit import macs_of

MIXED = ("conv3", "skip", "conv1", "msa")  # attention last: class tokens see what convolutions did only through it
TOLERANCE = 1e-6  # of the largest output, in double precision; some hosts keep softmax or positions in single
IMAGES = 16  # or more, where a convolution has more inputs than their tokens can tell apart
SHARE = 0.6  # of what the sites cost, that `decide` leaves


class ContractError(Exception):
    """A model breaks the contract."""


class OutOfTime(BaseException):  # no model's own `except Exception` may catch it
    """A model takes too long."""


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill weights and statistics with random numbers on which no check can pass by accident, in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        last = name.rpartition(".")[2]
        if last == "head_logits":
            parameter.copy_(1 + 0.01 * noise)
        elif parameter.dim() == 1:
            parameter.copy_(0.5 * noise + (0 if last in ("bias", "gate_logits") else 1))
        elif parameter.dim() > 1:
            parameter.copy_(noise / (2 if len(parameter) == 1 else math.sqrt(parameter[0].numel())))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.copy_(0.5 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    return model


@torch.no_grad()
def choose(net: nn.Module, kinds: Sequence[str]) -> nn.Module:
    """Make the attention gates of a searchable network decide on these kinds, in place."""
    gated = [module for module in net.modules() if hasattr(module, "head_logits")]
    for attention, kind in zip(gated, kinds, strict=True):
        opened = ("skip", "conv1", "conv3", "msa").index(kind)  # a gate behind a closed one is open, in vain
        signs = torch.tensor(([1.0] * opened + [-1.0] + [1.0] * 2)[:3])
        attention.gate_logits.copy_((attention.gate_logits.abs() + 0.1) * signs.to(attention.gate_logits))
    return net


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return every tensor that a model gives for images [B, C, H, W]; what is drawn in it is drawn alike."""
    torch.manual_seed(0)
    return [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def apart(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return the largest difference of two lists of tensors, relative to the largest number of each of the second."""
    if [tensor.shape for tensor in some] != [tensor.shape for tensor in others]:
        raise ContractError(f"outputs are {[list(t.shape) for t in some]}, not {[list(t.shape) for t in others]}")
    if not all(tensor.isfinite().all() for tensor in (*some, *others)):
        raise ContractError("an output is not finite")
    pairs = zip(some, others)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


def expect_equal(some: Sequence[Tensor], others: Sequence[Tensor], what: str, tolerance: float = TOLERANCE) -> None:
    """Raise ContractError where two lists of outputs differ."""
    if (found := apart(some, others)) > tolerance:
        raise ContractError(f"{what} differ by {found:.1e}")


class Trial:
    """A host and what is made of it once."""

    def __init__(self, host: spvit.Host) -> None:
        self.host = host
        generator = torch.Generator().manual_seed(0)
        sites = [block.attention for block in host.blocks]
        # A repair wants a quarter as many tokens as inputs, from half of the images.
        needed = max(9 * site.dim / (4 * math.prod(site.grid)) for site in sites)
        count = max(IMAGES, 2 * math.ceil(needed) + 2)
        self.images = torch.randn(count, *host.input_size, generator=generator, dtype=torch.float64)
        self.images = self.images.to(next(host.model.parameters()).dtype)
        self.x = self.images[:3]
        self.saved = False
        self.searched = True

    @cached_property
    def dense(self) -> list[Tensor]:
        """The host's own outputs."""
        return outputs(self.host.model, self.x)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """A kind of attention for every block."""
        count = len(self.host.blocks)
        return (*(MIXED[index % 4] for index in range(count - 1)), "msa")

    @cached_property
    def mixed(self) -> Architecture:
        """All kinds, half of the FFN units, attention narrower where it may be, rules that cost something."""
        blocks = []
        for kind, sites in zip(self.kinds, self.host.blocks):
            site = sites.attention
            value = site.head_width // 2 if kind == "msa" and site.narrows_values else None
            query = site.head_width // 2 if kind == "msa" and site.narrows_queries else None
            attention = Attention(kind, query_key_rank=query, value_rank=value)
            blocks.append(Block(attention, FFN(sites.ffn.units, tuple(range(0, sites.ffn.units, 2)))))
        return Architecture(tuple(blocks), prefix_rule="linear", skip_rule="mean")

    @cached_property
    def small(self) -> nn.Module:
        """What scores decide on, repaired and folded."""
        costs = network_costs(self.host)["macs"]
        target = costs.smallest + round(SHARE * (costs.dense - costs.smallest))
        sites = [block.attention for block in self.host.blocks]
        widest = max((site.head_width for site in sites if site.narrows_values or site.narrows_queries), default=1)
        multiple = 1 if widest <= 8 else widest // 2  # every rank is measured, and wide heads have many
        architecture = spvit.decide(self.host, macs=target, calibration=self.images, multiple=multiple)
        return spvit.fold(spvit.prune(self.host, architecture, repair=self.images))


def keeps_everything(trial: Trial) -> None:
    """A host pruned to all that it has answers bit for bit as before."""
    kept = spvit.prune(trial.host, dense([block.ffn.units for block in trial.host.blocks]))
    expect_equal(outputs(kept, trial.x), trial.dense, "the host and what keeps everything", tolerance=0)


def counts_exactly(trial: Trial) -> None:
    """The MACs predicted of a mixed architecture are those of the pruned and folded network, which is another one."""
    folded = spvit.fold(spvit.prune(trial.host, trial.mixed))
    predicted, counted = spvit.cost(trial.host, trial.mixed)["macs"], macs_of(folded, trial.x)
    if predicted != counted:
        raise ContractError(f"{predicted} MACs predicted, {counted} counted")
    if apart(outputs(folded, trial.x), trial.dense) < 1e-3:
        raise ContractError("a mixed network answers as the host")


def agrees_in_all_forms(trial: Trial) -> None:
    """What a searchable network computes in evaluation mode, the pruned and the folded one compute."""
    try:
        net = spvit.make_searchable(trial.host)
    except spvit.NotSearchableError:
        if all(block.ffn.norm is None for block in trial.host.blocks):
            raise
        trial.searched = False  # gates would change the statistics of a norm over the units; scores do not
        return
    net = choose(randomise(net, seed=1), trial.kinds).train().eval()  # some layers keep what evaluation made
    expected, architecture = outputs(net, trial.x), spvit.decide(net)
    if architecture.kinds() != trial.kinds:
        raise ContractError(f"gates of {trial.kinds} were read as {architecture.kinds()}")
    pruned = spvit.prune(trial.host, architecture, weights=net)
    expect_equal(outputs(pruned, trial.x), expected, "searchable and pruned")
    expect_equal(outputs(spvit.fold(pruned), trial.x), expected, "searchable and folded")


def decides_and_repairs(trial: Trial) -> None:
    """Scores from images decide within a budget, and what is pruned to it, with repair, runs and differs."""
    if apart(outputs(trial.small, trial.x), trial.dense) == 0:
        raise ContractError("a network of 60 % of the cost answers as the host")


def saves(trial: Trial) -> None:
    """What is loaded answers bit for bit as what was saved, onto the dense model where no file can rebuild it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            spvit.save(trial.small, Path(folder) / "model")
        except (spvit.UnsupportedHostError, spvit.CheckpointError):
            return
        built = can_build(source_of(trial.host.model))
        frame = None if built else copy.deepcopy(trial.host.model)
        loaded = spvit.load(Path(folder) / "model", host=frame).eval()
        loaded.to(trial.x.dtype)
    expect_equal(outputs(loaded, trial.x), outputs(trial.small, trial.x), "saved and loaded", tolerance=0)
    trial.saved = True


def exports(trial: Trial) -> None:
    """torch.export takes it with a dynamic batch, if it takes the dense host so."""

    def exported(model: nn.Module) -> nn.Module:
        return torch.export.export(model, (trial.x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()

    try:
        program = exported(trial.small)
    except Exception:
        try:
            exported(trial.host.model)
        except Exception:
            return
        raise
    expect_equal(outputs(program, trial.x), outputs(trial.small, trial.x), "exported and not")


CONTRACT: tuple[Callable[[Trial], None], ...] = (
    keeps_everything, counts_exactly, agrees_in_all_forms, decides_and_repairs, saves, exports,
)  # fmt: skip


def may_become(site: AttentionSite) -> str:
    """Return what attention at a site may become, in a word or two."""
    if site.narrows_queries and site.narrows_values:
        form = "narrower"
    elif site.narrows_values:
        form = "fewer heads and values"
    elif site.narrows_queries:
        form = "narrower queries and keys"
    else:
        form = "replaced whole"
    return f"{form}, in windows" if site.windows > 1 else form


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the context after so many seconds of the processor."""

    def stop(*_: Any) -> None:
        raise OutOfTime(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def tried(model: nn.Module, size: tuple[int, int, int]) -> tuple[str, str, bool]:
    """Return (result, detail, saved) of a tiny model that takes images of a size, (channels, height, width)."""
    stage = "recognise"
    try:
        host = spvit.recognise(randomise(model.double()).eval(), torch.zeros(2, *size, dtype=torch.float64))
        trial = Trial(host)
        for check in CONTRACT:
            stage = check.__name__
            check(trial)
    except (Exception, OutOfTime) as error:  # whatever comes out of a model is its outcome
        text = " ".join(str(error).split("\n")[0].split())
        if isinstance(error, spvit.UnsupportedHostError) and stage == "recognise":
            return "refused", text, False
        return "crash", f"{stage}: {type(error).__name__}: {text}"[:400], False
    forms = dict.fromkeys(may_become(block.attention) for block in host.blocks)
    return "passes", "; ".join([*forms, *([] if trial.searched else ["no search"])]), trial.saved


def outcomes_of(names: Sequence[str], limit: float) -> list[Outcome]:
    """Return the outcomes of names that should be one model: each is built, and what differs is tried by itself."""
    known: dict[tuple[Any, ...], tuple[str, str, bool]] = {}
    found = []
    for full in names:
        library, _, name = full.partition(":")
        family, arguments = tiny_models.timm_class(name) if library == "timm" else name, ""
        try:
            with at_most(limit):
                built = tiny_models.build(full)
                arguments = " ".join(f"{key}={value}" for key, value in built.arguments.items())
                state = tuple((key, tuple(value.shape)) for key, value in built.model.state_dict().items())
                key = (type(built.model), built.size, state)
                if key not in known:
                    known[key] = tried(built.model, built.size)
            result = known[key]
        except (Exception, OutOfTime) as error:
            result = ("crash", f"build: {type(error).__name__}: {error}"[:400], False)
        found.append(Outcome(library, family, name, *result, arguments))
    return found


def prepare() -> None:
    """Make a process quiet and single-threaded."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def census(names: Iterable[str], jobs: int, limit: float, file: Path | None = None) -> list[Outcome]:
    """Return the outcome of every name, in their order; a file holds those that are known so far."""
    names = list(names)
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[tiny_models.kind_of(name)].append(name)
    found: dict[str, Outcome] = {}
    said = 0
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=prepare) as pool:
        waiting = [pool.submit(outcomes_of, group, limit) for group in groups.values()]
        for future in as_completed(waiting):
            for outcome in future.result():
                found[f"{outcome.library}:{outcome.name}"] = outcome
                if outcome.result == "crash":
                    print(f"CRASH {outcome.library}:{outcome.name} {outcome.detail}", flush=True)
            if file is not None:
                file.write_text(json.dumps([asdict(outcome) for outcome in found.values()], indent=1) + "\n")
            if len(found) >= said + 50:
                said = len(found)
                print(f"{said} of {len(names)} names", flush=True)
    return [found[name] for name in names]


def main() -> int:
    """Run the census and write the page; return 1 where something crashes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help="names as library:name, * and ? stand for letters")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument(
        "--limit", type=float, default=60, help="seconds of the processor, a model (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="page to write")
    parser.add_argument("--json", type=Path, help="file to write every outcome to")
    options = parser.parse_args()
    prepare()
    every = tiny_models.names()
    names = [name for name in every if any(fnmatch.fnmatchcase(name, pattern) for pattern in options.only)]
    if not names:
        parser.error(f"no name is like {' or '.join(options.only)}; names are such as {every[0]}")
    outcomes = census(names, options.jobs, options.limit, options.json)
    for library in dict.fromkeys(outcome.library for outcome in outcomes):
        results = [outcome.result for outcome in outcomes if outcome.library == library]
        counts = ", ".join(f"{results.count(result)} {result}" for result in ("passes", "refused", "crash"))
        print(f"{library}: {len(results)} names: {counts}")
    if options.output:
        options.output.write_text(page(outcomes))
    return int(any(outcome.result == "crash" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
