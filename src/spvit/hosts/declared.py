"""Sites that a user declares for a class of models: names, from which follows what its attention computes.

Recognition then works with that in place of what it sees run: all that it verifies of a layer, it verifies of these.

Shapes: B images, N tokens, D width, H heads, E head width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn

from spvit.errors import UnsupportedHostError
from spvit.hosts.sites import NUMBER, BlockSites, Rows, UnitRows, expect
from spvit.hosts.weights import read_rows


@dataclass(frozen=True, kw_only=True)
class Sites:
    """Where the layers of a class of models are, by dotted names; `{}` in them stands for the number of the block.

    Projections are named inside the attention layer: a linear layer or a parameter. One that is named for several is
    packed: an equal share for each, queries first, head after head. `Rows` say where they are in any other order.
    """

    attention: str
    """The attention layer, such as blocks.{}.attn; it works on tokens [B, N, D], or its `norm` inside it does."""
    query: str | Rows
    key: str | Rows
    value: str | Rows
    out: str
    """The output projection."""
    heads: int
    first: str | tuple[str | UnitRows, ...]
    """The FFN's first linear layer; of gated units two, or one twice in which they are packed half and half."""
    second: str
    """The FFN's second linear layer."""
    scale: float | None = None
    """Factor of the logits before the softmax; None: one over the root of the head width."""
    norm: str | None = None
    """A norm inside the attention layer, before its projections."""
    token_first: bool = False
    """Whether the layer takes [N, B, D]."""
    prefix_tokens: int | None = None
    """Tokens before the patches, such as a class token; None: as many as are found."""
    grid: tuple[int, int] | None = None
    """(height, width) of the patches; None: as found."""
    input_size: tuple[int, int, int] | None = None
    """(channels, height, width) of its images; None: as the model says."""

    def layers(self, model: nn.Module) -> dict[str, int]:
        """Return the attention layers of a model by dotted name, with the numbers of their blocks, in that order."""
        pattern = re.compile(re.escape(self.attention).replace(re.escape(NUMBER), r"(\d+)", 1))
        found = {name: match for name, _ in model.named_modules() if (match := pattern.fullmatch(name))}
        if not found or self.attention.count(NUMBER) != 1:
            raise UnsupportedHostError(f"no module is called {self.attention!r}, with one {NUMBER} for a number")
        numbers = {name: int(match[1]) for name, match in found.items()}
        return dict(sorted(numbers.items(), key=lambda item: item[1]))

    def projected(self, path: str, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [B, H, N, E] of the tokens [B, N, D] that a layer's projections get."""
        columns = layer.get_parameter(_rows(path, layer, self.out).weight).shape[-1]
        width, rest = divmod(columns, self.heads)
        if rest:
            raise UnsupportedHostError(f"{path}: the {columns} columns of {self.out} are not {self.heads} heads")
        named, parts = (self.query, self.key, self.value), []
        for index, part in enumerate(named):
            start = named[:index].count(part) * columns
            rows = part if isinstance(part, Rows) else replace(_rows(path, layer, part), start=start)
            shape, last = layer.get_parameter(rows.weight).shape, int(rows.indices(self.heads, width).max())
            if len(shape) != 2 or last >= shape[0] or shape[1] != x.shape[-1]:
                expected = f"at least {last + 1} rows of {x.shape[-1]} for {self.heads} heads of {width}"
                raise UnsupportedHostError(f"{path}: {rows.weight} is {list(shape)}, expected {expected}")
            weight, bias = read_rows(layer, rows, (self.heads, width))
            made = x @ weight.flatten(0, 1).mT + (0 if bias is None else bias.flatten())
            parts.append(made.unflatten(-1, (self.heads, width)).transpose(1, 2))
        return parts[0], parts[1], parts[2]

    def ffn(self, model: nn.Module, attention: str) -> tuple[tuple[UnitRows, ...], str]:
        """Return the rows that make units, and the second linear layer, of the FFN beside an attention layer."""
        number = str(self.layers(model)[attention])
        second = self.second.replace(NUMBER, number)
        firsts = self.first if isinstance(self.first, tuple) else (self.first,)
        for name in (second, *(part if isinstance(part, str) else part.linear for part in firsts)):
            path = name.replace(NUMBER, number)
            if path not in dict(model.named_modules()):
                raise UnsupportedHostError(f"there is no layer {path}; name the FFN's linear layers")
            expect(model, path, nn.Linear, "these")
        units: int = cast(Any, model.get_submodule(second)).in_features
        rows = [
            part if isinstance(part, UnitRows) else UnitRows(part, firsts[:index].count(part) * units)
            for index, part in enumerate(firsts)
        ]
        return tuple(replace(part, linear=part.linear.replace(NUMBER, number)) for part in rows), second

    def check(self, model: nn.Module, blocks: Sequence[BlockSites]) -> None:
        """Raise UnsupportedHostError unless what was found of every declared layer is what is declared."""
        missing = list(self.layers(model).keys() - {block.attention.path for block in blocks})
        if missing:
            raise UnsupportedHostError(f"{min(missing)} has no block of its own that holds its FFN too")
        for block in blocks:
            site = block.attention
            for name, said, found in (
                ("out", self.out, site.out.weight.removesuffix(".weight")),
                ("prefix_tokens", self.prefix_tokens, site.prefix_tokens),
                ("grid", self.grid, site.grid),
            ):
                if said not in (None, found, site.out.weight):
                    raise UnsupportedHostError(f"{site.path}: {name} is declared as {said}, but found as {found}")


def _rows(path: str, layer: nn.Module, name: str) -> Rows:
    """Return all rows of a linear layer, or of a parameter, inside an attention layer."""
    known = dict(layer.named_parameters())
    weight = name if name in known else f"{name}.weight"
    if weight not in known:
        raise UnsupportedHostError(f"{path} has no linear layer or parameter {name!r}; it has {', '.join(known)}")
    bias = re.sub("weight$", "bias", weight)
    return Rows(weight, bias if bias != weight and bias in known else None)
