"""What the places of tokens do in attention: queries and keys rotate, and logits get a bias.

Shapes: B batch, H heads, N tokens, n of them that rotate, E head width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
