"""The one walker over a host: make searchable, decide, prune, fold. Copies by default; model in, model out."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from spvit.architecture import FFN, Architecture, ArchitectureError, Attention, Block, check_same_shape
from spvit.cost import Budget, BudgetError, NetworkCost, human, parse_budget
from spvit.gates import INITIAL_LOGIT, GateDraws, is_open
from spvit.hosts import Family, family_of
from spvit.hosts.base import BlockSites, UnsupportedHostError, network_costs
from spvit.kernels import POSITIONS, conv1_weights, conv3_weights, head_mix
from spvit.pruned import BottleneckConv, Grid, Skip, narrow_linear
from spvit.searchable import GatedLinear, SearchableAttention

TOLERANCE = 0.005
DEFAULT_MULTIPLE = 8
_RECORD = "spvit_record"

Model = TypeVar("Model", bound=nn.Module)


class NotSearchableError(ValueError):
    """A searchable network was expected, or a plain one, and the other was found."""


@dataclass(frozen=True)
class SearchRecord:
    """What a searchable network knows of its host: the costs by metric (`macs`, `params`)."""

    costs: dict[str, NetworkCost]


@dataclass(frozen=True)
class PrunedRecord:
    """What a pruned network knows of itself."""

    architecture: Architecture
    folded: bool


def search_record(net: nn.Module) -> SearchRecord:
    """Return what a searchable network knows, through any wrapper. Raises NotSearchableError."""
    for module in net.modules():
        record = getattr(module, _RECORD, None)
        if isinstance(record, SearchRecord):
            return record
    raise NotSearchableError(
        f"this {type(net).__name__} is not searchable; pass what spvit.make_searchable(host) returned"
    )


def pruned_record(model: nn.Module) -> PrunedRecord | None:
    """Return what a pruned network knows of itself, or None for a model that spvit has not pruned."""
    record = getattr(model, _RECORD, None)
    return record if isinstance(record, PrunedRecord) else None


def gated_layers(net: nn.Module) -> list[tuple[SearchableAttention, GatedLinear]]:
    """Return the gated attention and the gated linear layer of every block. Raises NotSearchableError."""
    search_record(net)
    attentions = [module for module in net.modules() if isinstance(module, SearchableAttention)]
    ffns = [module for module in net.modules() if isinstance(module, GatedLinear)]
    return list(zip(attentions, ffns, strict=True))


def gate_parameters(net: nn.Module) -> list[nn.Parameter]:
    """Return the gate logits of a searchable network, which want an optimizer of their own (no weight decay)."""
    return [layer.gate_logits for pair in gated_layers(net) for layer in pair]


def make_searchable(
    host: Model, *, temperature: float | None = None, gate_logit: float = INITIAL_LOGIT, inplace: bool = False
) -> Model:
    """Return the host with gates on every attention layer and FFN; it is called and trained like the host.

    Args:
        host: a model of a supported family, on any device.
        temperature: alpha of the head mix; the family's default when None (0.01 for ViT).
        gate_logit: theta, where every gate starts; a gate is open with probability sigmoid(theta).
        inplace: change the host itself instead of a copy.

    Raises:
        UnsupportedHostError: the host's family, or a part of it, is not known.
    """
    if getattr(host, _RECORD, None) is not None:
        raise NotSearchableError("this model is already searchable or pruned by spvit; start from the dense host")
    family = family_of(host)
    blocks = family.blocks(host)
    record = SearchRecord(network_costs(family, host))
    net = host if inplace else copy.deepcopy(host)
    grids = family.track_grids(net, range(len(blocks)), whole=False)
    draws = GateDraws()
    for index, block in enumerate(blocks):
        attention = SearchableAttention(
            net.get_submodule(block.attention.path),
            family.access,
            prefix_tokens=block.attention.prefix_tokens,
            grid=grids[index],
            temperature=family.temperature if temperature is None else temperature,
            draws=draws,
        )
        net.set_submodule(block.attention.path, attention)
        second = net.get_submodule(block.ffn.second)
        assert isinstance(second, nn.Linear)
        gated = GatedLinear(second, draws)
        net.set_submodule(block.ffn.second, gated)
        with torch.no_grad():
            attention.gate_logits.fill_(gate_logit)
            gated.gate_logits.fill_(gate_logit)
    setattr(net, _RECORD, record)
    return net


def decide(
    net: nn.Module, *, macs: str | int | None = None, params: str | int | None = None, multiple: int | None = None
) -> Architecture:
    """Return the architecture that the gates of a searchable network choose.

    Without a budget it is exactly what the network computes in evaluation mode. With one, attention stays as the
    gates say and the threshold on the FFN gates is shifted until the cost is within 0.5 % of the budget.

    Args:
        net: what `make_searchable` returned, searched.
        macs: budget: `"50%"` of the host's cost, `"1.0G"` or a whole number.
        params: the same in parameters; give at most one of the two.
        multiple: FFN widths are rounded to a multiple of it. Default: with a budget 8, or the largest of 4, 2, 1 that
            lands within 0.5 % where 8 is too coarse (very small hosts); without a budget 1.

    Raises:
        BudgetError: the budget is malformed, or cannot be reached; names the smallest or largest cost that can.
    """
    layers = gated_layers(net)
    kinds = [attention.decided() for attention, _ in layers]
    logits = [ffn.gate_logits.detach().float().cpu() for _, ffn in layers]
    if multiple is not None and multiple < 1:
        raise BudgetError(f"multiple is {multiple}, expected 1 or more units")
    if macs is None and params is None:
        widths = [_rounded(int(is_open(item).sum()), len(item), multiple or 1) for item in logits]
        return _architecture(kinds, logits, widths)
    budget = parse_budget(macs, params)
    cost = search_record(net).costs[budget.metric]
    candidates = [DEFAULT_MULTIPLE, 4, 2, 1] if multiple is None else [multiple]
    for candidate in candidates:
        found = _widths_at_budget(cost, budget, kinds, logits, candidate)
        if found is not None:
            return _architecture(kinds, logits, found)
    raise BudgetError(
        f"no FFN widths that are multiples of {candidates[-1]} come within 0.5% of {budget.target(cost):,} "
        f"{budget.metric}; use a smaller multiple or another budget"
    )


def _widths_at_budget(
    cost: NetworkCost, budget: Budget, kinds: Sequence[str], logits: Sequence[Tensor], multiple: int
) -> list[int] | None:
    """Return FFN widths for which the cost is within tolerance of the budget, or None when steps are too coarse.

    All blocks share one threshold on the gate logits. Lowering it opens groups of `multiple` units, each at the logit
    of the unit in its middle, which is rounding to the nearest multiple; ties go evenly over the blocks.
    """
    target = budget.target(cost)
    widths = [min(multiple, len(item)) for item in logits]
    spent = cost.fixed + sum(block.attention(kind) for block, kind in zip(cost.blocks, kinds))
    smallest = spent + sum(block.unit * width for block, width in zip(cost.blocks, widths))
    largest = spent + sum(block.unit * block.units for block in cost.blocks)
    slack = TOLERANCE * target
    for bound, word, reached in (
        (smallest, "smallest", target >= smallest - slack),
        (largest, "largest", target <= largest + slack),
    ):
        if not reached:
            raise BudgetError(
                f"a budget of {human(target)} {budget.metric} ({target / cost.dense:.1%}) cannot be reached with the "
                f"attention layers that the gates keep: the {word} reachable is {human(bound)} "
                f"({bound / cost.dense:.1%}, {bound:,} {budget.metric}); "
                "search longer or with a larger budget weight, or ask for that"
            )
    groups = []
    for index, item in enumerate(logits):
        descending = item.sort(descending=True).values.tolist()
        edges = [*range(widths[index], len(item), multiple), len(item)]
        for low, high in itertools.pairwise(edges):
            groups.append((-descending[(low + high) // 2], high / len(item), index, high - low))
    states = [(smallest, list(widths))]
    for _, _, index, count in sorted(groups):
        if states[-1][0] >= target:
            break
        widths[index] += count
        states.append((states[-1][0] + cost.blocks[index].unit * count, list(widths)))
    within = [state for state in states if abs(state[0] - target) <= slack]
    if not within:
        return None
    return max(within, key=lambda state: (state[0] <= target, -abs(state[0] - target)))[1]


def _rounded(count: int, width: int, multiple: int) -> int:
    return min(width, max(min(multiple, width), round(count / multiple) * multiple)) if multiple > 1 else count


def _architecture(kinds: Sequence[str], logits: Sequence[Tensor], widths: Sequence[int]) -> Architecture:
    blocks = []
    for kind, item, width in zip(kinds, logits, widths):
        best = item.sort(descending=True, stable=True).indices[:width]
        blocks.append(Block(Attention(kind), FFN(len(item), tuple(sorted(best.tolist())))))
    return Architecture(tuple(blocks))


def prune(host: Model, architecture: Architecture, *, weights: nn.Module | None = None, inplace: bool = False) -> Model:
    """Return the host cut down to an architecture, in plain stock modules with the same forward.

    What is kept keeps its modules, weights and keys. A convolution's kernel is made from its attention layer's weights;
    the FFNs' linear layers lose rows and columns.

    Args:
        host: the dense model.
        architecture: what to keep.
        weights: a searchable network made from such a host: take all weights, head mixes and batch norms from it.
            None takes the host's weights, with equal head mixes and fresh batch norms, as the method fine-tunes.
        inplace: change the host itself instead of a copy.

    Raises:
        ArchitectureError: the architecture does not fit the host.
        NotSearchableError: `weights` is not searchable, or the host is not dense.
    """
    if getattr(host, _RECORD, None) is not None:
        raise NotSearchableError("prune takes the dense host; pass a searchable network as weights=")
    family = family_of(host)
    blocks = family.blocks(host)
    check_same_shape(architecture, [block.ffn.units for block in blocks], f"this {type(host).__name__}")
    for index, block in enumerate(architecture.blocks):
        kept = (block.attention.heads, block.attention.query_key_dimensions, block.attention.value_dimensions)
        if any(part is not None for part in kept):
            raise ArchitectureError(f"block {index}: this version keeps all heads and dimensions of msa or none")
    model = host if inplace else copy.deepcopy(host)
    searched = None
    if weights is not None:
        searched = [attention for attention, _ in gated_layers(weights)]
        _load_dense_weights(model, weights)
    replaced = [index for index, kind in enumerate(architecture.kinds()) if kind != "msa"]
    grids = family.track_grids(model, replaced, whole=True)
    for index, (sites, kept_block) in enumerate(zip(blocks, architecture.blocks)):
        layer = searched[index] if searched is not None else None
        kind, grid = kept_block.attention.kind, grids.get(index)
        _replace_attention(model, family, sites, kind, architecture.skip_rule, layer, grid)
        _narrow_ffn(model, sites, kept_block.ffn)
    setattr(model, _RECORD, PrunedRecord(architecture, folded=False))
    return model


def _load_dense_weights(model: nn.Module, net: nn.Module) -> None:
    """Copy what a searchable network trained into a model of the host's own structure."""
    state = {}
    inner = {SearchableAttention: "attention", GatedLinear: "linear"}
    gated = {name: inner[type(module)] for name, module in net.named_modules() if type(module) in inner}
    root = next(name for name, module in net.named_modules() if hasattr(module, _RECORD))
    for key, value in net.state_dict().items():
        owner = next((name for name in gated if key.startswith(name + ".")), None)
        if owner is not None:
            part, _, rest = key[len(owner) + 1 :].partition(".")
            if part != gated[owner]:
                continue
            key = f"{owner}.{rest}"
        state[key[len(root) + 1 :] if root else key] = value
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise NotSearchableError(f"the searchable network was made from another host: {first}") from error


def _replace_attention(
    model: nn.Module,
    family: Family,
    sites: BlockSites,
    kind: str,
    skip_rule: str,
    searched: SearchableAttention | None,
    grid: Grid | None,
) -> None:
    if kind == "msa":
        return
    assert grid is not None
    site = sites.attention
    attention = model.get_submodule(site.path)
    replacement: nn.Module
    if kind == "skip":
        replacement = Skip(skip_rule, family.access.returns_tuple)
        if site.norm is not None and skip_rule == "zero":
            model.set_submodule(site.norm, nn.Identity().train(attention.training))
    else:
        shared = family.access.read(attention)
        fresh = shared.value_weight.new_ones(shared.value_weight.shape[0], POSITIONS)
        with torch.no_grad():
            mix = head_mix(fresh, 1.0) if searched is None else searched.head_mix().to(shared.value_weight)
            weights = (conv3_weights if kind == "conv3" else conv1_weights)(mix, shared)
        if searched is None:
            batchnorm = nn.BatchNorm2d(site.head_width, device=mix.device, dtype=mix.dtype)
        else:
            batchnorm = copy.deepcopy(searched.bn3 if kind == "conv3" else searched.bn1).to(mix)
        replacement = BottleneckConv(weights, batchnorm, site.prefix_tokens, grid, family.access.returns_tuple)
        replacement.requires_grad_(shared.value_weight.requires_grad)
    model.set_submodule(site.path, replacement.train(attention.training))


def _narrow_ffn(model: nn.Module, sites: BlockSites, ffn: FFN) -> None:
    if len(ffn.units) == ffn.width:
        return
    for path, axis in ((sites.ffn.first, 0), (sites.ffn.second, 1)):
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        units = torch.tensor(ffn.units, dtype=torch.long, device=linear.weight.device)
        model.set_submodule(path, narrow_linear(linear, units, axis))


def fold(model: Model, *, inplace: bool = False) -> Model:
    """Return a pruned model with every batch norm of its convolutions folded in: the form to deploy.

    In evaluation mode the output stays the same. A model that is already folded comes back unchanged.

    Raises:
        UnsupportedHostError: the model was not pruned by spvit.
    """
    record = pruned_record(model)
    if record is None:
        raise UnsupportedHostError(f"fold takes a model that spvit.prune returned, found a {type(model).__name__}")
    folded = model if inplace else copy.deepcopy(model)
    for module in folded.modules():
        if isinstance(module, BottleneckConv):
            module.fold_batchnorm()
    setattr(folded, _RECORD, PrunedRecord(record.architecture, folded=True))
    return folded
