"""Puts what an architecture keeps of a block in its place, in a model: the only code that replaces a host's layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from spvit.architecture import FFN, Architecture, Attention, Block
from spvit.errors import ArchitectureError
from spvit.hosts import Family
from spvit.hosts.base import BlockSites
from spvit.kernels import POSITIONS, conv1_weights, conv3_weights, head_mix
from spvit.narrowing import narrow_blindly
from spvit.pruned import BottleneckConv, Constant, Grid, NarrowAttention, Skip, narrow_linear
from spvit.repair import PREFIX_RULE, SKIP_RULE
from spvit.searchable import SearchableAttention


@contextmanager
def installed(model: nn.Module, family: Family, index: int, sites: BlockSites, kept: Block) -> Iterator[None]:
    """Have a block of a dense model keep so much, by the rules that a repair serves best; then put the block back.

    Args:
        model: changed in place meanwhile.
        family: the model's.
        index: of the block.
        sites: where its layers are.
        kept: what stays of it.
    """
    before = copy.deepcopy(model.get_submodule(sites.path))
    replaced = [index] if kept.attention.kind != "msa" else []
    grid = family.track_grids(model, replaced, whole=True).get(index)
    rules = Architecture((kept,), PREFIX_RULE, SKIP_RULE)
    replace_attention(model, family, sites, kept.attention, rules, None, grid)
    narrow_ffn(model, sites, kept.ffn)
    yield
    model.set_submodule(sites.path, before)


def check_narrowing(host: nn.Module, family: Family, sites: BlockSites, attention: Attention, where: str) -> None:
    """Raise ArchitectureError when a host's attention layer cannot be narrowed as asked.

    Args:
        host: the dense model.
        family: the host's.
        sites: where the block's layers are.
        attention: what is to stay.
        where: names the block in messages.
    """
    if not attention.narrowed():
        return
    site = sites.attention
    layer = family.access.read_projections(host.get_submodule(site.path))
    if layer is None:
        raise ArchitectureError(f"{where}: the attention of {family.name} hosts cannot be narrowed; keep it whole")
    if attention.heads is not None and attention.heads[-1] >= site.heads:
        raise ArchitectureError(
            f"{where}: head {attention.heads[-1]} is out of range, {family.name} has heads 0 to {site.heads - 1} there"
        )
    for name in ("query_key_rank", "value_rank"):
        rank = getattr(attention, name)
        if rank is not None and rank > site.head_width:
            raise ArchitectureError(
                f"{where}: {name} is {rank}, expected at most the head width of {family.name}, {site.head_width}"
            )
    if attention.query_key_rank is not None and layer.query_norm is not None:
        raise ArchitectureError(
            f"{where}: queries and keys are normalised over the whole head there, so they cannot be narrowed; "
            "leave query_key_rank out"
        )
    if (attention.heads is not None or attention.value_rank is not None) and layer.out_norm is not None:
        raise ArchitectureError(
            f"{where}: the outputs of all heads are normalised together there, so heads and values cannot be narrowed; "
            "leave heads and value_rank out"
        )


def replace_attention(
    model: nn.Module,
    family: Family,
    sites: BlockSites,
    kept: Attention,
    architecture: Architecture,
    searched: SearchableAttention | None,
    grid: Grid | None,
) -> None:
    """Put what an architecture keeps of an attention layer in its place, in a model.

    Args:
        model: dense at this site; changed in place.
        family: the model's.
        sites: where the block's layers are.
        kept: what stays of the attention.
        architecture: its rules for prefix tokens and skipped layers.
        searched: the site's layer in a searched network, for its head mix and batch norms; None for fresh
            ones.
        grid: of the patches, for convolutions; None for other kinds.
    """
    if kept.kind == "msa" and not kept.narrowed():
        return
    site, returns_tuple = sites.attention, family.access.returns_tuple
    attention = model.get_submodule(site.path)
    shared = family.access.read(attention)
    like = {"device": shared.value_weight.device, "dtype": shared.value_weight.dtype}
    replacement: nn.Module
    if kept.kind == "msa":
        layer = family.access.read_projections(attention)
        assert layer is not None
        replacement = NarrowAttention(narrow_blindly(layer, kept), layer, returns_tuple)
    elif kept.kind == "skip":
        replacement = Skip(
            architecture.skip_rule,
            returns_tuple,
            Constant(site.prefix_tokens + 1, site.dim, like) if architecture.skip_rule == "mean" else None,
        )
        if architecture.skip_rule != "normalised_input":
            _drop_norm(model, sites)
    else:
        fresh = shared.value_weight.new_ones(shared.value_weight.shape[0], POSITIONS)
        with torch.no_grad():
            mix = head_mix(fresh, 1.0) if searched is None else searched.head_mix().to(shared.value_weight)
            weights = (conv3_weights if kept.kind == "conv3" else conv1_weights)(mix, shared)
        if searched is None:
            batchnorm = nn.BatchNorm2d(site.head_width, device=mix.device, dtype=mix.dtype)
        else:
            batchnorm = copy.deepcopy(searched.bn3 if kept.kind == "conv3" else searched.bn1).to(mix)
        assert grid is not None
        replacement = BottleneckConv(
            weights, batchnorm, site.prefix_tokens, grid, returns_tuple, architecture.prefix_rule
        )
    replacement.requires_grad_(shared.value_weight.requires_grad)
    model.set_submodule(site.path, replacement.train(attention.training))


def _drop_norm(model: nn.Module, sites: BlockSites) -> None:
    """Leave out a norm that only a skipped attention layer read, in a model, in place."""
    site = sites.attention
    if site.norm is not None:
        model.set_submodule(site.norm, nn.Identity().train(model.get_submodule(site.path).training))


def narrow_ffn(model: nn.Module, sites: BlockSites, ffn: FFN) -> None:
    """Leave the kept units of an FFN only, in a model, in place."""
    if len(ffn.units) == ffn.width:
        return
    for path, axis in ((sites.ffn.first, 0), (sites.ffn.second, 1)):
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        units = torch.tensor(ffn.units, dtype=torch.long, device=linear.weight.device)
        model.set_submodule(path, narrow_linear(linear, units, axis))
