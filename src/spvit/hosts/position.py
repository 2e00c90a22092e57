"""What the places of tokens do in attention: queries and keys rotate, and logits get a bias; how each is found.

Candidates are the arguments of the layer and the tensors inside it. Queries that are rotated back must be a projection
of the tokens, and a bias must be what was added to the logits; what is not explained so stays unknown.

Shapes: B batch, H heads, N tokens = P prefix tokens + G patches, n of them that rotate, E head width.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spvit.hosts.behaviour.equations import CLOSE
from spvit.hosts.sites import Bias, Rotary


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
    module: nn.Module, own: nn.Module, bias: Tensor, heads: int, arguments: Mapping[str, Any], prefix: int
) -> Bias | None:
    """Return where what was added to the logits comes from; None: unknown. own: the host's own layer, not yet run."""
    want = bias.expand(-1, heads, -1, -1)
    for name, rest in _without_masks(want, arguments):
        found = find_bias(module, own, rest, heads, {}, prefix)
        return None if found is None else replace(found, mask=name)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point() and 2 <= value.dim() <= 4 and _same(value, want):
            return Bias(name, True)
    return _find_table(module, own, want, prefix)


def _find_table(module: nn.Module, own: nn.Module, want: Tensor, prefix: int) -> Bias | None:
    """Return the parameter of a layer, with the index inside the layer, that makes a bias [.., H, N, N]."""
    heads, tokens = want.shape[1:3]
    integers = {
        name: value
        for name, value in _tensors_inside(own).items()
        if isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64)
    }

    def makes(bias: Bias, parameter: Tensor) -> bool:
        entries = entries_by_head(bias, parameter, heads)
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
            if of_heads and makes(bias, parameter):
                return bias
    return None


def _without_masks(want: Tensor, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield arguments that are a mask of each window, [windows, N, N], and what is left without, alike for all."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or value.dim() != 3 or not 1 < len(value) <= len(want):
            continue
        if value.shape[1:] == want.shape[2:] and len(want) % len(value) == 0:
            rest = want.unflatten(0, (-1, len(value))) - value[:, None]
            if bool((rest - rest[:1, :1]).abs().max() <= CLOSE):
                yield name, rest[0, :1]


def _same(found: Tensor, want: Tensor) -> bool:
    """Return whether a bias, broadcast over images and heads, is what was added."""
    spread = float(want[want.isfinite()].std(correction=0))
    try:
        close = torch.isclose(found.to(want), want, rtol=CLOSE, atol=CLOSE * spread)
    except RuntimeError:  # shapes that do not broadcast
        return False
    return close.shape == want.shape and bool(close.all())
