"""Where the layers of a host are, and what a family of hosts has to say: locations and plain numbers, as data.

Weights are read and replacements are put in place by dotted names, so that no host's forward is ever touched.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spvit.errors import UnknownPartError
from spvit.hosts.grid import GatheredGrid, Grid, Layout


@dataclass(frozen=True)
class Rows:
    """Where the projection of all heads to queries, keys or values is: the rows of a parameter of the attention layer.

    Dimension e of head h is row `start + h * by_head + e * by_dim`. Of the output projection they are columns. For
    example three packed projections of 3 heads of 8: values start at 48; head-major packing has by_head 24.
    """

    weight: str
    """Name of the parameter inside the attention layer, [rows, D], or [D, columns] of the output projection."""
    bias: str | None = None
    """Name of its bias: one number for every row of the weight, or for those of this projection alone."""
    start: int = 0
    by_head: int | None = None
    """Rows from a head to the next; None: as many as a head is wide."""
    by_dim: int = 1
    """Rows from a dimension of a head to the next."""

    @staticmethod
    def of(linear: str, layer: nn.Module, start: int = 0) -> Rows:
        """Return rows of a linear layer inside an attention layer, with its bias if it has one, head after head."""
        biased = layer.get_submodule(linear).bias is not None
        return Rows(f"{linear}.weight", f"{linear}.bias" if biased else None, start)

    def indices(self, heads: int, width: int) -> Tensor:
        """Return the rows, [heads, width]."""
        by_head = width * self.by_dim if self.by_head is None else self.by_head
        return self.start + torch.arange(heads)[:, None] * by_head + torch.arange(width) * self.by_dim


@dataclass(frozen=True)
class Rotary:
    """How queries and keys are rotated by where their tokens are, two dimensions at a time, after their norms.

    The tables have a row for each of the last tokens; those in front stay as they are.
    """

    tables: tuple[str, ...]
    """Names of the tables of cosines and sines; of one name, what holds both (side by side, two items, complex)."""
    argument: bool
    """Whether these are arguments of the layer, or else tensors inside it."""
    sine_first: bool
    pairs: bool
    """Whether dimensions 2 i and 2 i + 1 rotate together, or else i and i + E / 2."""
    by_head: bool
    """Whether each head has tables of its own, [H, tokens, E]."""


@dataclass(frozen=True)
class Bias:
    """What is added to the scaled logits, the same for every image."""

    table: str | None
    """Name of the argument of the layer that it is, [.., H or 1, N, N], or of the parameter inside it that holds it;
    None: the layer computes it from its parameters (by a small network, say), so it is read from what it adds."""
    argument: bool
    heads_first: bool = False
    """Whether the parameter is [H, entries] (or [H, N, N]), or else [entries, H]."""
    index: str | None = None
    """Name, inside the layer, of the tensor of each pair of tokens' entry; None: the entries are all pairs."""
    mask: str | None = None
    """Name of the argument of the layer that is added besides, [windows, N, N] or None: a mask of shifted windows."""
    entries: int = 0
    """How many entries a computed bias has for each head."""


@dataclass(frozen=True)
class AttentionSite:
    """Where an attention layer sits and what it works on."""

    path: str
    """Dotted name of the layer in the host."""
    norm: str | None
    """Dotted name of the norm that feeds this layer alone and goes when the layer is skipped; None to keep it."""
    query: Rows
    key: Rows
    value: Rows
    out: Rows
    dim: int
    heads: int
    head_width: int
    prefix_tokens: int
    grid: tuple[int, int]
    """(height, width) of the patch grid at the host's own input size."""
    keys: int
    """Tokens that each query attends to."""
    windows: int = 1
    """Windows that an image's tokens go in, of `keys` tokens each, padding included; 1: all tokens are one."""
    layout: Grid | Layout | None = None
    """How attention gets the grid, where it does not get its tokens row-major behind the prefix tokens."""
    extra_macs: int = 0
    """MACs of the layer, for one image, beside its projections and the products of attention: of its positions, say."""
    narrows_queries: bool = False
    """Whether queries and keys may have fewer dimensions, or pairs of them where they rotate: nothing else acts."""
    narrows_values: bool = False
    """Whether values may have fewer dimensions, and heads may go."""
    scale: float = 1.0
    """Factor of the logits before the softmax."""
    dropout: float = 0.0
    """Dropout probability of the attention weights."""
    out_dropout: float = 0.0
    """Dropout probability of the output."""
    norms: tuple[str | None, str | None, str | None] = (None, None, None)
    """Names, inside the layer, of norms over a head's queries, over its keys, and over the outputs of all heads."""
    inner_norm: str | None = None
    """Name, inside the layer, of a norm that its input goes through first."""
    cosine: bool = False
    """Whether queries and keys are scaled to length one."""
    head_scales: bool = False
    """Whether the layer scales each head's logits, as it has learned."""
    rotary: Rotary | None = None
    """How queries and keys are rotated; None: they are not."""
    bias: Bias | None = None
    """What is added to the scaled logits; None: nothing."""
    parameters: tuple[str, ...] = ()
    """Names of what the layer's forward takes, the tokens first; empty: tokens, then perhaps a mask."""
    tuple_items: int = 0
    """How many items the layer answers with: the output, then None; 0: the output itself."""
    token_first: bool = False
    """Whether it takes and answers [N, B, D] in place of [B, N, D]."""

    def own_grid(self) -> Grid:
        """Return how attention gets the grid of images of the host's own size; it does not follow other sizes."""
        if isinstance(self.layout, Layout):
            return GatheredGrid(*self.grid, self.layout)
        return Grid(*self.grid) if self.layout is None else self.layout

    @property
    def tokens(self) -> int:
        """All tokens of one image."""
        return self.prefix_tokens + self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class UnitRows:
    """Where an FFN's hidden units are made: unit u is row `start + u * step` of a linear layer."""

    linear: str
    """Dotted name of the linear layer in the host."""
    start: int = 0
    step: int = 1


@dataclass(frozen=True)
class FFNSite:
    """Where an FFN sits."""

    first: tuple[UnitRows, ...]
    """One row a unit; two where units are gated (SwiGLU), in two linear layers or packed in one."""
    second: str
    """Dotted name of its second linear layer in the host."""
    units: int
    norm: str | None = None
    """Dotted name of a norm over the hidden units, or of a depthwise convolution; it gets narrower with them."""

    @property
    def linears(self) -> tuple[str, ...]:
        """Dotted names of the linear layers that make the units."""
        return tuple(dict.fromkeys(rows.linear for rows in self.first))


@dataclass(frozen=True)
class BlockSites:
    """A block and its two sites."""

    path: str
    """Dotted name of the block in the host: a module that maps tokens [B, N, D] to tokens of the same shape, or a
    ModuleList of layers whose outputs are added to the tokens one after the other."""
    attention: AttentionSite
    ffn: FFNSite
    before: str | None = None
    """Dotted name of a module that stands between the previous block and this one; None when nothing does."""
    channels_first: bool = False
    """Whether that module takes and answers maps [B, D, height, width]."""


NUMBER = "{}"
"""Stands for a block's number in names."""
PLAIN = (
    "merge adapters first (model = model.merge_and_unload()), prune before you quantise, and take off parametrisations"
)
"""What to do with layers that wrap linear ones."""


def expect(model: nn.Module, path: str, cls: type, family: str) -> None:
    """Raise UnknownPartError unless the module at a dotted name is of exactly this class.

    Subclasses compute something else with the same weights: a LoRA layer adds its adapter, a quantised one unpacks.
    """
    found = type(model.get_submodule(path))
    if found is cls:
        return
    advice = f"; {PLAIN}" if cls is nn.Linear else ""
    raise UnknownPartError(
        f"{path} is a {found.__module__}.{found.__qualname__}, but {family} hosts are supported with exactly "
        f"{cls.__module__}.{cls.__qualname__} there{advice}"
    )


def pattern_of(block: BlockSites) -> tuple[BlockSites, int | None]:
    """Return a block's sites with `{}` for its number in every name, and the number; None where it has none."""
    found = re.search(r"\d+(?=\D*$)", block.path)
    if found is None:
        return block, None
    path = f"{block.path[: found.start()]}{NUMBER}{block.path[found.end() :]}"
    return renamed(block, block.path, path), int(found[0])


def renamed(value: Any, old: str, new: str) -> Any:
    """Return sites with another beginning of every dotted name that begins with one, or is it."""
    if isinstance(value, str):
        return new + value[len(old) :] if f"{value}.".startswith(f"{old}.") else value
    if isinstance(value, tuple):
        return tuple(renamed(item, old, new) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: renamed(getattr(value, field.name), old, new) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed)
    return value


def alike(blocks: Sequence[BlockSites]) -> list[tuple[BlockSites, list[int]]]:
    """Return blocks that follow each other and are alike but for their number together: the pattern, the numbers."""
    found: list[tuple[BlockSites, list[int]]] = []
    for block in blocks:
        pattern, number = pattern_of(block)
        numbers = [] if number is None else [number]
        if found and number is not None and found[-1][0] == pattern:
            found[-1][1].append(number)
        else:
            found.append((pattern, numbers))
    return found
