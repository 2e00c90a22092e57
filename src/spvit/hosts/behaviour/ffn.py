"""Where an FFN's hidden units are made and read: verified by halving one unit's rows and seeing what moves.

Shapes: D width, U hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from spvit.errors import UnsupportedHostError
from spvit.hosts.behaviour.watch import Pass, first_tensor, stopped_at
from spvit.hosts.sites import FFNSite, UnitRows, expect


def find_ffn(twin: nn.Module, seen: Pass, block: str, attention: str, dim: int) -> FFNSite:
    """Return where a block's FFN sits, outside of its attention.

    Raises:
        UnsupportedHostError: there is none, or its units do not act one by one.
    """
    if seen.declared is None:
        second, tried = _ways(twin, seen, block, attention, dim)
    else:
        rows, second = seen.declared.ffn(twin, attention)
        tried = [rows]
    firsts = list(dict.fromkeys(part.linear for rows in tried for part in rows))
    for path in (second, *firsts):
        expect(twin, path, nn.Linear, "these")
        if not path.startswith(f"{block}.") or path not in seen.calls:
            raise UnsupportedHostError(f"{path} does not run in {block}; name the linear layers of its FFN")
        if len(seen.calls[path]) != 1:
            raise UnsupportedHostError(
                f"{path} runs {len(seen.calls[path])} times in a forward pass (in chunks of tokens?); expected once"
            )
    units = cast(nn.Linear, twin.get_submodule(second)).in_features
    probe = _Probe(twin, seen, block, second, units)
    for rows in tried:
        norm = probe.verified(rows)
        if norm is not None:
            site = FFNSite(rows, second, units, norm or None)
            probe.check_narrower(site)
            return site
    raise UnsupportedHostError(
        f"{second}: the hidden units of this FFN do not act one by one: no rows of "
        f"{', '.join(firsts) or 'a linear layer before it'} move exactly one of its {units} inputs"
    )


def _ways(twin: nn.Module, seen: Pass, block: str, attention: str, dim: int) -> tuple[str, list[tuple[UnitRows, ...]]]:
    """Return the second layer of the last FFN that ran in a block, and the ways in which its units may be made."""
    ran = [
        (seen.calls[path][0].order, path, module)
        for name, module in twin.get_submodule(block).named_modules()
        if isinstance(module, nn.Linear) and (path := f"{block}.{name}") in seen.calls
        if not path.startswith(f"{attention}.")
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
    firsts = [
        (path, module)
        for path, module in linears[: ends[-1]]
        if module.in_features == dim and module.out_features in (units, 2 * units)
    ]
    return second, list(_candidates(firsts, units))


def _candidates(firsts: Sequence[tuple[str, nn.Linear]], units: int) -> Iterator[tuple[UnitRows, ...]]:
    """Yield the ways in which linear layers may hold the rows of units."""
    if len(firsts) == 1 and firsts[0][1].out_features == 2 * units:
        path = firsts[0][0]
        yield UnitRows(path), UnitRows(path, units)
        yield UnitRows(path, 0, 2), UnitRows(path, 1, 2)
    elif firsts and all(module.out_features == units for _, module in firsts):
        yield tuple(UnitRows(path) for path, _ in firsts)


class _Probe:
    """Runs the part of a block that holds the FFN again, with weights changed."""

    def __init__(self, twin: nn.Module, seen: Pass, block: str, second: str, units: int) -> None:
        self.twin, self.units = twin, units
        self.second: Any = twin.get_submodule(second)
        module = twin.get_submodule(block)
        if isinstance(module, nn.ModuleList):
            block = f"{block}.{second[len(block) + 1 :].split('.')[0]}"
        self.path, self.module, self.call = block, twin.get_submodule(block), seen.calls[block][0]
        self.norms = [
            path
            for name, part in self.module.named_modules()
            if (path := f"{block}.{name}") in seen.calls and _is_norm(part, units)
        ]

    def verified(self, rows: tuple[UnitRows, ...]) -> str | None:
        """Return the norm over the units, or "" without one, if these rows make units; None if they do not."""
        if self._moves_alone(rows):
            return ""
        for norm in self.norms:
            with _passing(self.twin.get_submodule(norm)):
                if self._moves_alone(rows):
                    return norm
        return None

    def _moves_alone(self, rows: tuple[UnitRows, ...]) -> bool:
        """Return whether each row of a unit moves that one input of the second layer alone."""
        before = self._hidden()
        unit = int(before.flatten(0, -2).std(0).argmax())  # one that an activation does not shut
        for part in rows:
            linear: Any = self.twin.get_submodule(part.linear)
            row = part.start + part.step * unit
            with _restored(linear.weight, linear.bias), torch.no_grad():
                linear.weight[row] *= 0.5
                if linear.bias is not None:
                    linear.bias[row] *= 0.5
                after = self._hidden()
            moved = (after - before).abs().flatten(0, -2).amax(0) > 1e-6 * before.abs().max()
            if moved.nonzero().flatten().tolist() != [unit]:
                return False
        return True

    def _hidden(self) -> Tensor:
        return stopped_at(self.module, None, self.second, self.call)

    def check_narrower(self, site: FFNSite) -> None:
        """Raise UnsupportedHostError unless the FFN with half its units is the one whose other half is not read."""
        half = (self.units + 1) // 2
        linears: list[Any] = [self.twin.get_submodule(path) for path in site.linears]
        with _restored(self.second.weight), torch.no_grad():
            self.second.weight[:, half:] = 0
            expected = self._run()
        kept = torch.arange(half)
        parameters = [part for module in (*linears, self.second) for part in (module.weight, module.bias)]
        saved = [(part, part.data) for part in parameters if part is not None]
        features = [(module, module.in_features, module.out_features) for module in (*linears, self.second)]
        try:
            for module, path in zip(linears, site.linears):
                rows = torch.cat([part.start + part.step * kept for part in site.first if part.linear == path])
                rows = rows.sort().values.to(module.weight.device)
                module.weight.data, module.out_features = module.weight.data[rows], len(rows)
                if module.bias is not None:
                    module.bias.data = module.bias.data[rows]
            self.second.weight.data, self.second.in_features = self.second.weight.data[:, :half], half
            narrow = self._run(None if site.norm is None else self.twin.get_submodule(site.norm))
        except (RuntimeError, ValueError, AssertionError, LookupError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UnsupportedHostError(
                f"{site.second}: the FFN does not run with fewer units ({reason}); "
                "its forward must not name their number"
            ) from error
        finally:
            for part, data in saved:
                part.data = data
            for module, into, out in features:
                module.in_features, module.out_features = into, out
        scale = float(expected.abs().max())
        if site.norm is None and not torch.allclose(narrow, expected, rtol=1e-3, atol=1e-4 * scale):
            raise UnsupportedHostError(f"{site.second}: the FFN with half its units does not drop the others alone")

    def _run(self, norm: nn.Module | None = None) -> Tensor:
        with nullcontext() if norm is None else _passing(norm):
            output = first_tensor(self.call.again(self.module))
        assert output is not None
        return output


def _is_norm(module: nn.Module, units: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1 and len(weight) == units


@contextmanager
def _passing(module: nn.Module) -> Iterator[None]:
    """Have a module answer its input inside the context, without running."""
    forward = module.forward
    module.forward = lambda x, *args, **kwargs: x
    try:
        yield
    finally:
        module.forward = forward


@contextmanager
def _restored(*parameters: Tensor | None) -> Iterator[None]:
    """Put the values of parameters back at the end of the context."""
    saved = [(part, part.detach().clone()) for part in parameters if part is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for part, values in saved:
                part.copy_(values)
