"""Where an FFN's hidden units are made and read: verified by halving one unit's rows and seeing what moves.

Shapes: D width, U hidden units.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spvit.errors import UnsupportedHostError, first_line
from spvit.hosts.behaviour.watch import Pass
from spvit.hosts.calling import reached
from spvit.hosts.sites import FFNSite, UnitRows, expect
from spvit.hosts.units import is_depthwise, narrow_ffn


def find_ffn(seen: Pass, block: str, attention: str, dim: int) -> FFNSite:
    """Return where a block's FFN sits, outside of its attention.

    Raises:
        UnsupportedHostError: there is none, or its units do not act one by one.
    """
    if seen.declared is None:
        second, tried = _ways(seen, block, attention, dim)
    else:
        rows, second = seen.declared.ffn(seen.model, attention)
        tried = [rows]
    firsts = list(dict.fromkeys(part.linear for rows in tried for part in rows))
    for path in (second, *firsts):
        expect(seen.model, path, nn.Linear, "these")
        if not path.startswith(f"{block}.") or path not in seen.calls:
            raise UnsupportedHostError(f"{path} does not run in {block}; name the linear layers of its FFN")
        seen.once(path)
    units = cast(nn.Linear, seen.module(second)).in_features
    runs = block  # the part of the block that holds the FFN: a ModuleList is not called itself
    if isinstance(seen.module(block), nn.ModuleList):
        runs = f"{block}.{second[len(block) + 1 :].split('.')[0]}"
    norms = [f"{runs}.{name}" for name, part, _ in seen.inside(runs) if _is_norm(part, units)]
    depthwise = [f"{runs}.{name}" for name, part, _ in seen.inside(runs) if is_depthwise(part, units)]
    for rows in tried:
        for norm in (*depthwise, None, *norms):
            site = FFNSite(rows, second, units, norm)
            if _move_alone(seen, runs, site):
                return site
    raise UnsupportedHostError(
        f"{second}: the hidden units of this FFN do not act one by one: no rows of "
        f"{', '.join(firsts) or 'a linear layer before it'} move exactly one of its {units} inputs"
    )


def _ways(seen: Pass, block: str, attention: str, dim: int) -> tuple[str, list[tuple[UnitRows, ...]]]:
    """Return the second layer of the last FFN that ran in a block, and the ways in which its units may be made."""
    ran = [
        (call.order, f"{block}.{name}", module)
        for name, module, call in seen.inside(block)
        if isinstance(module, nn.Linear) and not f"{block}.{name}".startswith(f"{attention}.")
    ]
    linears = [(path, module) for _, path, module in sorted(ran, key=lambda item: item[0])]
    ends = [index for index, (_, module) in enumerate(linears) if index and module.out_features == dim]
    if not ends:
        shapes = ", ".join(f"{path} {module.in_features} -> {module.out_features}" for path, module in linears)
        raise UnsupportedHostError(
            f"{block}: no FFN was found behind or beside {attention}: looked for linear layers {dim} -> units -> "
            f"{dim}, found {shapes or 'none'}"
        )
    second, last = linears[ends[-1]]
    units = last.in_features
    widths = {path: module.out_features for path, module in linears[: ends[-1]] if module.in_features == dim}
    firsts = [path for path, width in widths.items() if width in (units, 2 * units)]
    if len(firsts) == 1 and widths[firsts[0]] == 2 * units:
        path = firsts[0]
        return second, [(UnitRows(path), UnitRows(path, units)), (UnitRows(path, 0, 2), UnitRows(path, 1, 2))]
    alike = bool(firsts) and all(widths[path] == units for path in firsts)
    return second, [tuple(UnitRows(path) for path in firsts)] if alike else []


def _is_norm(module: nn.Module, units: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1 and len(weight) == units


def _move_alone(seen: Pass, runs: str, site: FFNSite) -> bool:
    """Return whether each row of a unit moves that one input of the second layer alone, without the units' norm."""

    def hidden() -> Tensor:
        return reached(seen.calls[runs][0].again, seen.module(runs), seen.module(site.second), output=False)

    with swapped(seen.model, {} if site.norm is None else {site.norm: nn.Identity()}):
        before = hidden()
        unit = int(before.flatten(0, -2).std(0).argmax())  # one that an activation does not shut
        for part in site.first:
            linear: Any = copy.deepcopy(seen.module(part.linear))
            for parameter in linear.parameters():
                parameter[part.start + part.step * unit] *= 0.5
            with swapped(seen.model, {part.linear: linear}):
                after = hidden()
            moved = (after - before).abs().flatten(0, -2).amax(0) > 1e-6 * before.abs().max()
            if moved.nonzero().flatten().tolist() != [unit]:
                return False
    return True


def check_narrower(model: nn.Module, images: Tensor, ffns: Sequence[FFNSite]) -> None:
    """Raise UnsupportedHostError unless a model with half the units of its FFNs is the one that reads no others."""
    if _narrower(model, images, ffns) is None:
        return
    for site in ffns:
        reason = _narrower(model, images, [site])
        if reason is not None:
            raise UnsupportedHostError(f"{site.second}: {reason}")
    raise UnsupportedHostError(f"its FFNs: {_narrower(model, images, ffns)}")


def _narrower(model: nn.Module, images: Tensor, ffns: Sequence[FFNSite]) -> str | None:
    """Return what is wrong with a model in which some FFNs have half their units; None: nothing."""
    whole: dict[str, nn.Module] = {}
    narrow: dict[str, nn.Module] = {}
    for site in ffns:
        kept = torch.arange((site.units + 1) // 2)
        narrow |= narrow_ffn(model, site, kept)
        second: Any = copy.deepcopy(model.get_submodule(site.second))
        second.weight[:, len(kept) :] = 0
        whole[site.second] = second
        if site.norm is not None and not is_depthwise(model.get_submodule(site.norm), site.units):
            whole[site.norm] = narrow[site.norm] = nn.Identity()
    with swapped(model, whole):
        expected = _tensors(model(images))
    try:
        with swapped(model, narrow):
            found = _tensors(model(images))
    except Exception as error:  # whatever a forward raises for another number of units
        reason = first_line(error)
        return f"the FFN does not run with fewer units ({reason}); no forward of the model may name their number"
    for one, other in zip(found, expected):
        near = 1e-4 * float(other.abs().max()) if other.numel() else 0.0
        if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-3, atol=near, equal_nan=True):
            return "the model with half its units is not the one that reads no others: something else reads them"
    return None


def _tensors(output: Any) -> list[Tensor]:
    """Return all numbers in what a model answered."""
    leaves = tree_leaves(vars(output) if dataclasses.is_dataclass(output) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Have other modules stand at some dotted names inside the context."""
    with ExitStack() as undo:
        for path, module in modules.items():
            undo.callback(model.set_submodule, path, model.get_submodule(path))
            model.set_submodule(path, module)
        yield
