"""The one walker over a host: make searchable, decide, prune, fold. Copies by default; model in, model out."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spvit.architecture import Architecture, check_same_shape
from spvit.blockwise import where_float64_is
from spvit.cost import NetworkCost
from spvit.errors import NotSearchableError, UnsupportedHostError
from spvit.gated_linear import GatedLinear
from spvit.gates import INITIAL_LOGIT, GateDraws
from spvit.hosts import family_of
from spvit.hosts.base import network_costs
from spvit.install import check_narrowing, narrow_ffn, replace_attention
from spvit.pruned import BottleneckConv
from spvit.repair import repair as repair_in_place
from spvit.searchable import SearchableAttention

_RECORD = "spvit_record"

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class SearchRecord:
    """What a searchable network knows of itself."""

    costs: dict[str, NetworkCost]
    """What its host costs, by metric (`macs`, `params`)."""


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
    return [layer.gate_logits for layers in gated_layers(net) for layer in layers]


def check_dense(host: nn.Module) -> None:
    """Raise NotSearchableError when a model is not a dense host any more."""
    if getattr(host, _RECORD, None) is not None:
        raise NotSearchableError("this model is already searchable or pruned by spvit; start from the dense host")


def make_searchable(
    host: Model,
    *,
    temperature: float | None = None,
    gate_logit: float = INITIAL_LOGIT,
    inplace: bool = False,
) -> Model:
    """Return the host with gates on every attention layer and FFN; it is called and trained like the host.

    Args:
        host: a model of a supported family, on any device.
        temperature: alpha of the published head mix; the family's default when None (0.01 for ViT).
        gate_logit: theta, where every gate starts; a gate is open with probability sigmoid(theta).
        inplace: change the host itself instead of a copy.

    Raises:
        UnsupportedHostError: the host's family, or a part of it, is not known.
    """
    check_dense(host)
    family = family_of(host)
    blocks = family.blocks(host)
    record = SearchRecord(network_costs(family, host))
    net = host if inplace else copy.deepcopy(host)
    grids = family.track_grids(net, range(len(blocks)), whole=False)
    draws = GateDraws()
    for index, block in enumerate(blocks):
        site = block.attention
        attention = SearchableAttention(
            net.get_submodule(site.path),
            family.access,
            prefix_tokens=site.prefix_tokens,
            grid=grids[index],
            temperature=family.temperature if temperature is None else temperature,
            draws=draws,
        )
        net.set_submodule(site.path, attention)
        second = net.get_submodule(block.ffn.second)
        assert isinstance(second, nn.Linear)
        net.set_submodule(block.ffn.second, GatedLinear(second, draws))
    setattr(net, _RECORD, record)
    with torch.no_grad():
        for logits in gate_parameters(net):
            logits.fill_(gate_logit)
    return net


def prune(
    host: Model,
    architecture: Architecture,
    *,
    weights: nn.Module | None = None,
    repair: Tensor | Iterable[Any] | None = None,
    inplace: bool = False,
) -> Model:
    """Return the host cut down to an architecture, in plain stock modules with the same forward.

    What is kept keeps its modules, weights and keys. A convolution's kernel is made from its attention layer's weights;
    the FFNs' linear layers lose rows and columns.

    Args:
        host: the dense model.
        architecture: what to keep.
        weights: a searchable network made from such a host: take all weights, head mixes and batch norms from it.
            None takes the host's weights, with equal head mixes and fresh batch norms, as the method fine-tunes.
        repair: calibration images, a few hundred or more, unlabelled: a tensor [images, channels, height, width] or
            batches of such (a data loader's labels are passed over). What pruning breaks is then repaired in closed
            form, layer by layer. None leaves the repair to training.
        inplace: change the host itself instead of a copy.

    Raises:
        ArchitectureError: the architecture does not fit the host.
        NotSearchableError: `weights` is not searchable, or the host is not dense.
        CalibrationError: the calibration images do not fit the host, are too few, or give values that are not finite.
    """
    if getattr(host, _RECORD, None) is not None:
        raise NotSearchableError("prune takes the dense host; pass a searchable network as weights=")
    family = family_of(host)
    blocks = family.blocks(host)
    check_same_shape(architecture, [block.ffn.units for block in blocks], f"this {type(host).__name__}")
    for index, (sites, block) in enumerate(zip(blocks, architecture.blocks)):
        check_narrowing(host, family, sites, block.attention, f"block {index}")
    model = host if inplace else copy.deepcopy(host)
    searched = None
    if weights is not None:
        searched = [attention for attention, _ in gated_layers(weights)]
        _load_dense_weights(model, weights)
    # What the repair aims at: the model before it loses anything, with the weights that it has by now.
    dense = copy.deepcopy(model) if repair is not None else None
    replaced = [index for index, kind in enumerate(architecture.kinds()) if kind != "msa"]
    grids = family.track_grids(model, replaced, whole=True)
    with where_float64_is(model):
        for index, (sites, kept_block) in enumerate(zip(blocks, architecture.blocks)):
            layer = searched[index] if searched is not None else None
            replace_attention(model, family, sites, kept_block.attention, architecture, layer, grids.get(index))
            narrow_ffn(model, sites, kept_block.ffn)
    if dense is not None and repair is not None:
        repair_in_place(model, dense, family, architecture, repair)
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
