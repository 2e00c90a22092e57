"""Which rows of which parameter make a tensor: told apart by equations, want = s (x W^T + b), not by names.

Shapes: T tokens of some images, D width, H heads, E head width, R rows of a parameter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from spvit.hosts.sites import Rows

CLOSE = 1e-3
"""Largest relative error of an equation in single precision that counts as rounding."""


def rows_that_make(layer: nn.Module, x: Tensor, want: Tensor) -> tuple[Rows, float] | None:
    """Return the rows of a layer's parameter, and the factor s, with which want = s (x W^T + b); None if none do.

    x: [T, D]; want: [T, H, E].
    """
    x, want = x.detach().double(), want.detach().double()
    heads, width = want.shape[1:]
    centred = want.flatten(1) - want.flatten(1).mean(0)
    for name, weight in layer.named_parameters():
        if weight.dim() != 2 or weight.shape[1] != x.shape[1] or len(weight) < heads * width:
            continue
        made = x @ weight.detach().double().T  # [T, R]
        own = made - made.mean(0)
        likeness = _unit(own).T @ _unit(centred)  # [R, H E]
        best = likeness.abs().max(dim=0)
        found = _pattern(
            best.indices.unflatten(0, (heads, width)), (best.values > 1 - CLOSE).unflatten(0, (heads, width))
        )
        if found is None:
            continue
        start, by_head, by_dim = found
        rows = Rows(name, None, start, by_head, by_dim)
        taken = rows.indices(heads, width).flatten()
        if not 0 <= int(taken.min()) <= int(taken.max()) < len(weight):
            continue
        taken = taken.to(own.device)
        factor = float((own[:, taken] * centred).sum() / own[:, taken].square().sum())
        if not _same(factor * own[:, taken], centred):
            continue
        constant = want.flatten(1).mean(0) / factor - made[:, taken].mean(0)
        bias = _bias(layer, constant, taken, len(weight), made[:, taken].std(), name)
        if bias is not None:
            plain = by_dim == 1 and by_head == width
            return Rows(name, bias or None, start, None if plain else by_head, by_dim), factor
    return None


def columns_that_read(layer: nn.Module, heads_out: Tensor, want: Tensor) -> Rows | None:
    """Return the output projection of a layer: want = o W^T + b, with o the outputs of all heads side by side.

    heads_out: [T, H, E]; want: [T, D].
    """
    heads, width = heads_out.shape[1:]
    outputs, want = heads_out.detach().double(), want.detach().double()
    for name, weight in layer.named_parameters():
        if weight.shape != (want.shape[1], heads * width):
            continue
        for rows in (Rows(name), Rows(name, None, 0, 1, heads)):
            taken = rows.indices(heads, width).flatten().to(weight.device)
            made = outputs.flatten(1) @ weight.detach().double()[:, taken].T
            constant = (want - made).mean(0)
            if _same(made + constant, want):
                bias = _bias(layer, constant, torch.arange(len(constant)), len(constant), made.std(), name)
                if bias is not None:
                    return Rows(name, bias or None, 0, rows.by_head, rows.by_dim)
    return None


def places_of(rows: Tensor, source: Tensor) -> tuple[int, ...] | None:
    """Return which row of a source [R, C] each row is, bit for bit; -1: padding, all alike. None: it cannot be said."""
    known: dict[bytes, int] = {}
    for index, row in enumerate(source.double().cpu().numpy()):
        known[row.tobytes()] = -2 if row.tobytes() in known else index
    found = [known.get(row.tobytes(), -1) for row in rows.double().cpu().numpy()]
    padding = rows[[place == -1 for place in found]]
    if -2 in found or len(padding) == len(rows) or not bool((padding == padding[:1]).all()):
        return None
    return tuple(found)


def _unit(columns: Tensor) -> Tensor:
    return columns / columns.norm(dim=0).clamp(min=1e-12)


def _same(found: Tensor, want: Tensor) -> bool:
    return bool((found - want).abs().max() <= CLOSE * want.abs().max())


def _pattern(indices: Tensor, good: Tensor) -> tuple[int, int, int] | None:
    """Return start, by_head and by_dim of rows [H, E], of which those that are good must agree and be most."""
    if good.double().mean() < 0.75:
        return None
    heads, width = indices.shape
    by_dim = _most((indices[:, 1:] - indices[:, :-1])[good[:, 1:] & good[:, :-1]].tolist(), 1)
    by_head = _most((indices[1:] - indices[:-1])[good[1:] & good[:-1]].tolist(), width)
    rest = indices - by_head * torch.arange(heads)[:, None].to(indices) - by_dim * torch.arange(width).to(indices)
    return _most(rest[good].tolist(), 0), by_head, by_dim


def _most(values: Iterable[int], otherwise: int) -> int:
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else otherwise


def _bias(layer: nn.Module, constant: Tensor, taken: Tensor, rows: int, spread: Tensor, weight: str) -> str | None:
    """Return the name of the bias that a constant [H E] is, "" for a constant of zero, None if it is no parameter."""
    tolerance = CLOSE * float(constant.abs().max() + spread)
    names = sorted(
        dict(layer.named_parameters()), key=lambda name: name.rpartition(".")[0] != weight.rpartition(".")[0]
    )
    for name in names:
        parameter = layer.get_parameter(name)
        if parameter.dim() != 1 or len(parameter) not in (rows, len(constant)):
            continue
        own = parameter.detach().double()
        own = own[taken.to(own.device)] if len(own) == rows else own
        if bool((own - constant).abs().max() <= tolerance):
            return name
    return "" if bool(constant.abs().max() <= tolerance) else None
