"""Puts what an architecture keeps of a block in its place, in a model: the only code that replaces a host's layers.

Every change goes through `put`, which says how to take it back: a verb that fails leaves the model as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from spvit.architecture import FFN, REPAIRED, Architecture, Attention, Block, Rules
from spvit.errors import ArchitectureError
from spvit.hosts.calling import answer_as_tuple, in_place, stand_in
from spvit.hosts.grid import Grid
from spvit.hosts.host import Host
from spvit.hosts.sites import AttentionSite
from spvit.hosts.units import narrow_ffn
from spvit.replacements import replacement
from spvit.replacements.skip import NoNorm


def put(model: nn.Module, path: str, module: nn.Module, undo: ExitStack) -> None:
    """Put a module in the place of the one at a dotted name; closing `undo` puts that one back."""
    undo.callback(model.set_submodule, path, model.get_submodule(path))
    model.set_submodule(path, module)


def put_attention(host: Host, site: AttentionSite, module: nn.Module, undo: ExitStack) -> None:
    """Put a module where an attention layer is, which it then answers like, in the host's model."""
    stand_in(module, host.model.get_submodule(site.path))
    if site.tuple_items:
        module.register_forward_hook(functools.partial(answer_as_tuple, items=site.tuple_items))
    put(host.model, site.path, module, undo)


def check_fits(host: Host, architecture: Architecture) -> None:
    """Raise ArchitectureError when an architecture is of another host, or narrows what cannot be narrowed."""
    if len(architecture.blocks) != len(host.blocks):
        raise ArchitectureError(
            f"the architecture has {len(architecture.blocks)} blocks, but {host.name} has {len(host.blocks)}; "
            "use an architecture that was decided for this host"
        )
    for index, (sites, block) in enumerate(zip(host.blocks, architecture.blocks)):
        if block.ffn.width != sites.ffn.units:
            raise ArchitectureError(
                f"block {index}: the architecture is for an FFN of {block.ffn.width} units, but {host.name} has "
                f"{sites.ffn.units}; use an architecture that was decided for this host"
            )
        if block.tokens == "prefix" and not has_prefix(sites.attention):
            raise ArchitectureError(
                f"block {index}: the architecture computes prefix tokens alone, but {host.name} has none there; use an "
                "architecture that was decided for this host"
            )
        reason = _not_narrowed(sites.attention, block.attention, host.family.name)
        if reason is not None:
            raise ArchitectureError(f"block {index}: {reason}")


def has_prefix(site: AttentionSite) -> bool:
    """Return whether a block may run for prefix tokens alone: there are some, in one window with all others."""
    return site.prefix_tokens > 0 and site.windows == 1 and site.layout is None


def _not_narrowed(site: AttentionSite, kept: Attention, name: str) -> str | None:
    """Return why an attention layer cannot be narrowed as asked; None when it can."""
    if not kept.narrowed():
        return None
    if not (site.narrows_queries or site.narrows_values):
        return f"the attention of {name} hosts cannot be narrowed; keep it whole"
    if kept.heads is not None and kept.heads[-1] >= site.heads:
        return f"head {kept.heads[-1]} is out of range, {name} has heads 0 to {site.heads - 1} there"
    for part, rank in (("query_key_rank", kept.query_key_rank), ("value_rank", kept.value_rank)):
        if rank is not None and rank > site.head_width:
            return f"{part} is {rank}, expected at most the head width of {name}, {site.head_width}"
    if kept.query_key_rank is not None and kept.query_key_rank % 2 and site.rotary is not None:
        return f"query_key_rank is {kept.query_key_rank}, but dimensions rotate in pairs there; give an even number"
    if kept.query_key_rank is not None and not site.narrows_queries:
        return (
            "queries and keys are normalised over the whole head there, or the places of tokens act on them, so they "
            "cannot be narrowed; leave query_key_rank out"
        )
    if (kept.heads is not None or kept.value_rank is not None) and not site.narrows_values:
        return (
            "the outputs of all heads are normalised together there, so heads and values cannot be narrowed; leave "
            "heads and value_rank out"
        )
    return None


def replace_attention(
    host: Host, index: int, kept: Attention, rules: Rules, grids: dict[int, Grid], undo: ExitStack, **hints: Any
) -> None:
    """Put what an architecture keeps of a block's attention in its place, in the host's model; hints: as for `make`."""
    site = host.blocks[index].attention
    layer = host.model.get_submodule(site.path)
    module = replacement(kept.kind).make(layer, site, kept, rules, grids.get(index, Grid(*site.grid)), **hints)
    if module is layer:
        return
    blind = kept.kind == "skip" and rules.skip != "normalised_input"
    if blind and site.norm is not None:
        no_norm = NoNorm(next(layer.parameters())).train(layer.training)  # nothing else reads the norm
        put(host.model, site.norm, no_norm, undo)
    _stay_frozen(module, layer)
    put_attention(host, site, in_place(site, layer, module.train(layer.training), not blind), undo)


def _stay_frozen(module: nn.Module, layer: nn.Module) -> None:
    """Freeze weights, or biases, of what replaces a layer where some of the layer's projections' are frozen.

    Norms that the module takes over stay as they are. Without biases the weights speak for new ones.
    """
    own = dict(layer.named_parameters())
    norms = {name.removesuffix("weight") for name in own if name.endswith(".weight") and own[name].dim() == 1}
    kinds: dict[bool, list[bool]] = {False: [], True: []}  # whether weights, and biases, are frozen
    for name, parameter in own.items():
        if not name.startswith(tuple(norms)):
            kinds[name.endswith("bias")].append(not parameter.requires_grad)
    taken_over = {id(parameter) for parameter in own.values()}
    for name, parameter in module.named_parameters():
        if id(parameter) not in taken_over:
            parameter.requires_grad_(not any(kinds[name.endswith("bias")] or kinds[False]))


def keep_units(host: Host, index: int, ffn: FFN, undo: ExitStack) -> None:
    """Leave the kept units of an FFN only, in the host's model, in place."""
    if len(ffn.units) < ffn.width:
        units = torch.tensor(ffn.units, dtype=torch.long)
        for path, narrow in narrow_ffn(host.model, host.blocks[index].ffn, units).items():
            put(host.model, path, narrow, undo)


@contextmanager
def installed(host: Host, index: int, kept: Block) -> Iterator[Grid | None]:
    """Have a block of a dense model keep so much, by the rules that a repair serves best; then put the block back.

    Inside the context the weights of what stands where attention was are still to be fitted. Yields how that gets the
    grid, if it is no attention.
    """
    with ExitStack() as undo:
        grids = host.family.whole_grids(host.model, [index] if kept.attention.kind != "msa" else [], undo)
        replace_attention(host, index, kept.attention, REPAIRED, grids, undo, fitted=True, tokens=kept.tokens)
        keep_units(host, index, kept.ffn, undo)
        yield grids.get(index)
