"""What the places of tokens do in attention: queries and keys rotate, and logits get a bias; how each is found.

Candidates are the arguments of the layer and the tensors inside it. Queries that are rotated back must be a projection
of the tokens, and a bias must be what was added to the logits; what is not explained so stays unknown.

Shapes: B batch, H heads, N tokens = P prefix tokens + G patches, n of them that rotate, E head width.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spvit.hosts.behaviour.equations import CLOSE
from spvit.hosts.behaviour.watch import Core, watch
from spvit.hosts.sites import AttentionSite, Bias, Rotary

IMAGES = 3
HIDDEN = -50
"""What is added to logits below it hides a token."""


def inside_layer(layer: nn.Module, name: str) -> Any:
    """Return the attribute of a layer, or of a module inside it, at a dotted name."""
    return functools.reduce(getattr, name.split("."), layer)


def cosines_and_sines(rotary: Rotary, values: Sequence[Any], heads: int, width: int) -> tuple[Tensor, Tensor]:
    """Return both tables, [n, E] each or [H, n, E], from what their names stand for. width: E."""
    value = values[0]
    if len(values) == 2:
        first, second = values
    elif isinstance(value, (tuple, list)):
        first, second = value
    else:
        first, second = torch.view_as_real(value).unbind(-1) if value.is_complex() else value.chunk(2, -1)

    def table(part: Tensor) -> Tensor:
        part = part.reshape(*([heads] if rotary.by_head else []), -1, part.shape[-1])
        if part.shape[-1] == width:
            return part
        return part.repeat_interleave(2, -1) if rotary.pairs else torch.cat((part, part), -1)

    return (table(second), table(first)) if rotary.sine_first else (table(first), table(second))


def dimensions_of(pairs: Tensor, interleaved: bool, width: int) -> Tensor:
    """Return the dimensions [.., R] of some pairs [.., R / 2] of a head of E, in the order that `rotated` takes."""
    if interleaved:
        return torch.stack((2 * pairs, 2 * pairs + 1), -1).flatten(-2)
    return torch.cat((pairs, pairs + width // 2), -1)


def rotated(x: Tensor, cosines: Tensor, sines: Tensor, pairs: bool) -> Tensor:
    """Return queries or keys [B, H, N, E] of which the last n tokens are rotated; with -sines, rotated back."""
    prefix = x.shape[-2] - cosines.shape[-2]
    moving = x[..., prefix:, :]
    if pairs:
        across = torch.stack((-moving[..., 1::2], moving[..., ::2]), -1).flatten(-2)
    else:
        first, second = moving.chunk(2, -1)
        across = torch.cat((-second, first), -1)
    return torch.cat((x[..., :prefix, :], (moving * cosines + across * sines).to(x.dtype)), dim=-2)


def entries_by_head(bias: Bias, parameter: Tensor, heads: int) -> Tensor:
    """Return a parameter of biases as [entries, H]."""
    return parameter.reshape(heads, -1).T if bias.heads_first else parameter.reshape(-1, heads)


def entries_read(bias: Tensor, index: Tensor | None) -> Tensor:
    """Return the entries [entries, H] of a bias [H, N, N], as an index of all pairs of the last tokens has them."""
    side = bias.shape[-1] if index is None else math.isqrt(len(index))
    pairs = bias[:, -side:, -side:].flatten(1).T
    if index is None or len(index) != len(pairs):
        return pairs
    entries = pairs.new_zeros(int(index.max()) + 1, pairs.shape[1])
    entries[index] = pairs
    return entries


def bias_of_pairs(entries: Tensor, index: Tensor | None, tokens: int) -> Tensor:
    """Return the bias [H, N, N] from its entries, [entries, H]; prefix tokens that it leaves out get zeros."""
    rows = entries if index is None else entries[index]
    side = math.isqrt(len(rows))
    bias = rows.T.reshape(-1, side, side)
    return bias if side == tokens else F.pad(bias, (tokens - side, 0, tokens - side, 0))


def rotations(
    own: nn.Module, queries: Tensor, keys: Tensor, arguments: Mapping[str, Any], prefix: int
) -> Iterator[tuple[Rotary, Tensor, Tensor]]:
    """Yield how queries and keys [B, H, N, E] may have been rotated, and both rotated back.

    own: the host's own layer, which has not run: its tensors are those that it starts with.
    """
    _, heads, tokens, width = queries.shape
    counts = (tokens, tokens - prefix)
    for argument, found in ((True, arguments), (False, _tensors_inside(own))):
        for (names, values), pairs, sine_first in itertools.product(_tables(found, width), *[(True, False)] * 2):
            first = values[0][0] if isinstance(values[0], (tuple, list)) else values[0]
            rotary = Rotary(names, argument, sine_first, pairs, first.shape[:-1].numel() not in counts)
            try:
                cosines, sines = cosines_and_sines(rotary, values, heads, width)
            except (RuntimeError, ValueError):  # tensors of other shapes
                continue
            if rotary.by_head and torch.equal(cosines[:1].expand_as(cosines), cosines):  # tables of each image
                continue
            if cosines.shape[-2] in counts and _rotate(cosines, sines, pairs):
                yield rotary, rotated(queries, cosines, -sines, pairs), rotated(keys, cosines, -sines, pairs)


def _tables(found: Mapping[str, Any], width: int) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
    """Yield the names and values of what may be tables of cosines and sines."""
    halves = {}
    for name, value in found.items():
        if isinstance(value, (tuple, list)):
            if len(value) == 2 and all(isinstance(item, Tensor) and item.shape == value[0].shape for item in value):
                yield (name,), [value]
        elif isinstance(value, Tensor) and value.dim() >= 2 and (value.is_complex() or value.is_floating_point()):
            if value.is_complex() or value.shape[-1] in (2 * width, width):
                yield (name,), [value]
            halves[name] = value
    for (first, one), (second, other) in itertools.combinations(halves.items(), 2):
        if one.shape == other.shape and one.shape[-1] in (width, width // 2):
            yield (first, second), [one, other]


def _rotate(cosines: Tensor, sines: Tensor, pairs: bool) -> bool:
    """Return whether tables are cosines and sines of angles that the two dimensions of a pair share."""

    def shared(table: Tensor) -> bool:
        one, other = (table[..., ::2], table[..., 1::2]) if pairs else table.chunk(2, -1)
        return torch.equal(one, other)

    unit = bool(((cosines.square() + sines.square()) - 1).abs().max() <= CLOSE)
    return unit and shared(cosines) and shared(sines)


def _tensors_inside(layer: nn.Module) -> dict[str, Any]:
    """Return what is no parameter inside a layer, by dotted name: buffers and plain attributes."""
    found = {}
    for path, module in layer.named_modules():
        for name, value in {**module._buffers, **vars(module)}.items():
            if isinstance(value, (Tensor, tuple, list)):
                found[f"{path}.{name}".removeprefix(".")] = value
    return found


def find_bias(
    module: nn.Module,
    own: nn.Module,
    bias: Tensor,
    heads: int,
    arguments: Mapping[str, Any],
    prefix: int,
    alone: Callable[[], Core | None],
) -> Bias | None:
    """Return where what was added to the logits comes from; None: unknown.

    own: the host's own layer, not yet run; alone: runs the module on other tokens, without further arguments.
    """
    want = bias.expand(-1, heads, -1, -1)
    for name, rest in _without_masks(want, arguments):
        found = find_bias(module, own, rest, heads, {}, prefix, alone)
        return None if found is None else replace(found, mask=name)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point() and 2 <= value.dim() <= 4 and _same(value, want):
            return Bias(name, True)
    return _find_table(module, own, want, prefix, alone)


def _find_table(
    module: nn.Module, own: nn.Module, want: Tensor, prefix: int, alone: Callable[[], Core | None]
) -> Bias | None:
    """Return the parameter of a layer, with the index inside the layer, that makes a bias [.., H, N, N].

    Without such a parameter the layer computes the bias: then the index says which pairs of tokens share an entry.
    """
    heads, tokens = want.shape[1:3]
    integers = {
        name: value
        for name, value in _tensors_inside(own).items()
        if isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64)
    }

    def makes(bias: Bias, entries: Tensor) -> bool:
        places = None if bias.index is None else integers[bias.index].flatten()
        count = len(entries) if places is None else len(places)
        if math.isqrt(count) ** 2 != count or math.isqrt(count) not in (tokens, tokens - prefix):
            return False
        if places is not None and not 0 <= int(places.min()) <= int(places.max()) < len(entries):
            return False
        return _same(bias_of_pairs(entries, places, tokens), want)

    for name, parameter in module.named_parameters():
        first = next((size for size in parameter.shape if size > 1), 1)
        for heads_first, index in itertools.product((True, False), (None, *integers)):
            bias = Bias(name, False, heads_first, index)
            of_heads = parameter.dim() > 1 and (first if heads_first else parameter.shape[-1]) == heads
            if of_heads and makes(bias, entries_by_head(bias, parameter, heads)):
                return bias
    again = alone()
    if again is None or again.bias is None or not _same(again.bias[:1], want):
        return None
    for index in (*integers, None):
        places = None if index is None else integers[index].flatten()
        if places is None or (len(places) and int(places.min()) >= 0):
            entries = entries_read(want[0], places)
            if makes(bias := Bias(None, False, False, index, entries=len(entries)), entries):
                return bias
    return None


@torch.no_grad()
def core_alone(layer: nn.Module, tokens: int, dim: int, token_first: bool) -> Core | None:
    """Return what attention computes in a copy of a layer of random tokens [3, N, D] and nothing else; or None."""
    weight = next(layer.parameters())
    exact = weight.dtype if weight.dtype == torch.float64 else torch.float32
    x = torch.randn(IMAGES, tokens, dim, generator=torch.Generator().manual_seed(0)).to(weight.device, exact)
    try:
        seen = watch(copy.deepcopy(layer).eval().to(exact), x.transpose(0, 1) if token_first else x)
    except Exception:  # whatever a layer raises that wants more than tokens
        return None
    return seen.cores[-1] if seen.cores and seen.cores[-1].scale is not None else None


def measured_logits(layer: nn.Module, site: AttentionSite) -> tuple[Tensor | None, Tensor | None]:
    """Return the scale of each head, [H], and the entries of the bias, [entries, H], that a dense layer computes.

    Seen in a copy of the layer at work; on the meta device both have no values. None: it computes none.
    """
    weight = layer.get_parameter(site.out.weight)
    computed = site.bias is not None and site.bias.table is None
    if not (computed or site.head_scales):
        return None, None
    if weight.is_meta:
        entries = weight.new_empty(site.bias.entries, site.heads) if site.bias is not None and computed else None
        return weight.new_empty(site.heads) if site.head_scales else None, entries
    core, scales = core_alone(layer, site.keys, site.dim, site.token_first), None
    assert core is not None
    if site.head_scales:
        scales = (
            torch.full((site.heads,), core.scale or 1.0, dtype=torch.float64) if core.scales is None else core.scales
        ).to(weight)
    if site.bias is None or not computed:
        return scales, None
    bias = core.query.new_zeros(1, 1, site.keys, site.keys) if core.bias is None else core.bias.detach()
    index = None if site.bias.index is None else inside_layer(layer, site.bias.index).flatten()
    return scales, entries_read(bias[0].expand(site.heads, -1, -1).to(weight.dtype), index)


def _without_masks(want: Tensor, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield arguments that are a mask of each window, [windows, N, N], and what is left without, alike for all.

    Where a mask hides a pair of tokens it matters not by how much: transformers' Swin V2 adds its mask twice.
    """
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or value.dim() != 3 or not 1 < len(value) <= len(want):
            continue
        if value.shape[1:] == want.shape[2:] and len(want) % len(value) == 0:
            added, seen = want.unflatten(0, (-1, len(value))), (value > HIDDEN)[:, None].to(want)
            rest = ((added - value[:, None]) * seen).sum((0, 1)) / (seen.sum(0) * len(added))  # [H, N, N]
            near = (added - value[:, None] - rest).abs() <= CLOSE
            if bool(torch.where(seen > 0, near, added < rest + HIDDEN).all()):
                yield name, rest[None]


def _same(found: Tensor, want: Tensor) -> bool:
    """Return whether a bias, broadcast over images and heads, is what was added."""
    finite = want[want.isfinite()]
    spread = float(finite.std(correction=0)) if len(finite) else 0.0
    try:
        close = torch.isclose(found.to(want), want, rtol=CLOSE, atol=CLOSE * spread)
    except RuntimeError:  # shapes that do not broadcast
        return False
    return close.shape == want.shape and bool(close.all())
