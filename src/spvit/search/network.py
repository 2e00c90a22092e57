"""A searchable network: the host with gates on every attention layer and FFN, and what it knows of itself."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import nn

from spvit.cost import NetworkCost
from spvit.errors import NotSearchableError
from spvit.hosts.family import Family
from spvit.hosts.host import Host
from spvit.hosts.recognise import RECORD
from spvit.replacements.costs import network_costs
from spvit.replacements.install import put, put_attention
from spvit.search.gated_attention import GatedAttention
from spvit.search.gated_linear import GatedLinear
from spvit.search.gates import INITIAL_LOGIT, GateDraws

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class SearchRecord:
    """What a searchable network knows of itself."""

    costs: dict[str, NetworkCost]
    """What its host costs, by metric (`macs`, `params`)."""
    family: Family
    """The family of its host."""


def searchable_inside(net: nn.Module) -> nn.Module | None:
    """Return the searchable network inside any wrapper; None when there is none."""
    # Looked up in the module itself: a compiled one answers for the one inside.
    return next((part for part in net.modules() if isinstance(vars(part).get(RECORD), SearchRecord)), None)


def search_record(net: nn.Module) -> SearchRecord:
    """Return what a searchable network knows, through any wrapper. Raises NotSearchableError."""
    inside = searchable_inside(net)
    if inside is None:
        raise NotSearchableError(
            f"this {type(net).__name__} is not searchable; pass what spvit.make_searchable(host) returned"
        )
    record: SearchRecord = vars(inside)[RECORD]
    return record


def gated_layers(net: nn.Module) -> list[tuple[GatedAttention, GatedLinear]]:
    """Return the gated attention and the gated linear layer of every block. Raises NotSearchableError."""
    search_record(net)
    attentions = [module for module in net.modules() if isinstance(module, GatedAttention)]
    ffns = [module for module in net.modules() if isinstance(module, GatedLinear)]
    return list(zip(attentions, ffns, strict=True))


def gate_parameters(net: nn.Module) -> list[nn.Parameter]:
    """Return the gate logits of a searchable network, which want an optimizer of their own (no weight decay)."""
    return [layer.gate_logits for layers in gated_layers(net) for layer in layers]


def make_searchable(
    host: Model, *, temperature: float | None = None, gate_logit: float = INITIAL_LOGIT, inplace: bool = False
) -> Model:
    """Return the host with gates on every attention layer and FFN; it is called and trained like the host.

    Args:
        host: a model of a supported family, on any device (or its `Host`).
        temperature: alpha of the head mix; the family's default when None (0.01 for ViT).
        gate_logit: theta, where every gate starts; a gate is open with probability sigmoid(theta).
        inplace: change the host itself instead of a copy.

    Raises:
        UnsupportedHostError: the host's family, or a part of it, is not known.
        NotSearchableError: the model is searchable or pruned already, or has norms over its hidden units.
    """
    dense = Host.of(host)
    norms = [block.ffn.norm for block in dense.blocks if block.ffn.norm is not None]
    normed = next((path for path in norms if not isinstance(dense.model.get_submodule(path), nn.Conv2d)), None)
    if normed is not None:
        raise NotSearchableError(
            f"{normed} is a norm over an FFN's hidden units, whose statistics gates would change; use spvit.score and "
            "spvit.decide instead of a search"
        )
    record = SearchRecord(network_costs(dense), dense.family)
    alpha = dense.family.temperature if temperature is None else temperature
    searched = dense if inplace else dense.on(copy.deepcopy(dense.model))
    net = searched.model
    with ExitStack() as undo:
        grids = dense.family.watch_grids(net, range(len(dense.blocks)), undo)
        draws = GateDraws()
        for index, block in enumerate(dense.blocks):
            site = block.attention
            attention = GatedAttention(net.get_submodule(site.path), site, grids[index], alpha, draws)
            put_attention(searched, site, attention, undo)
            second = net.get_submodule(block.ffn.second)
            assert isinstance(second, nn.Linear)
            put(net, block.ffn.second, GatedLinear(second, draws), undo)
        undo.pop_all()
    setattr(net, RECORD, record)
    with torch.no_grad():
        for logits in gate_parameters(net):
            logits.fill_(gate_logit)
    return cast(Model, net)


def dense_state(net: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that a searchable network has trained, under the keys of its host."""
    searched = searchable_inside(net)
    assert searched is not None
    inner = {GatedAttention: "attention.", GatedLinear: "linear."}
    gated = {f"{name}.": inner[type(module)] for name, module in searched.named_modules() if type(module) in inner}
    state = {}
    for key, value in searched.state_dict().items():
        owner = next((name for name in gated if key.startswith(name)), None)
        if owner is None:
            state[key] = value
        elif key[len(owner) :].startswith(gated[owner]):
            state[owner + key[len(owner) + len(gated[owner]) :]] = value
    return state
