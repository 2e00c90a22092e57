"""What a pruned network is: frozen dataclasses and their JSON form.

An architecture is data. It knows nothing of weights or of any host, and this file needs the standard library only, so
that an architecture can be read, written and compared anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from spvit.errors import ArchitectureError, CheckpointError
from spvit.fields import fields_of, from_data, to_data

DEFAULT_MULTIPLE = 8
"""Widths and ranks are multiples of it unless said otherwise: what hardware computes well."""

KINDS = {
    "msa": "spvit.replacements.narrow:REPLACEMENT",
    "conv3": "spvit.replacements.bottleneck:CONV3",
    "conv1": "spvit.replacements.bottleneck:CONV1",
    "skip": "spvit.replacements.skip:REPLACEMENT",
}
"""What may stand where attention was, the costliest first, and where its code is: a new kind is a new line."""
NARROWINGS = ("heads", "query_key_rank", "value_rank")
PREFIX_RULES = ("identity", "linear")
SKIP_RULES = ("zero", "normalised_input", "mean")
TOKENS = ("all", "prefix")
FORMAT = "spvit-architecture"
VERSION = 1


def _check_known(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ArchitectureError(f"{name} {value!r} is unknown, expected one of {', '.join(known)}")


def _check_indices(name: str, indices: Sequence[int], limit: int | None) -> None:
    for previous, index in zip([-1, *indices], indices):
        if isinstance(index, bool) or not isinstance(index, int):
            raise ArchitectureError(f"{name}: found {index!r}, expected whole numbers")
        if index < 0 or (limit is not None and index >= limit):
            bound = "0 or more" if limit is None else f"from 0 to {limit - 1}"
            raise ArchitectureError(f"{name}: index {index} is out of range, expected {bound}")
        if index <= previous:
            raise ArchitectureError(f"{name}: index {index} follows {previous}, expected strictly ascending indices")


@dataclass(frozen=True)
class Attention:
    """What stands where one attention layer was."""

    kind: str = "msa"
    """`msa` (the layer as it was), `conv3`, `conv1` (bottleneck convolutions) or `skip` (nothing)."""
    heads: tuple[int, ...] | None = None
    """Heads kept, for `msa`; all when None."""
    query_key_rank: int | None = None
    """Dimensions of the queries and keys of every head, for `msa`; all when None."""
    value_rank: int | None = None
    """Dimensions of the values of every head, for `msa`; all when None."""

    def __post_init__(self) -> None:
        _check_known("attention kind", self.kind, KINDS)
        for name in NARROWINGS:
            kept = getattr(self, name)
            if kept is not None and self.kind != "msa":
                raise ArchitectureError(f"attention {name} goes with kind msa only, found it with {self.kind}")
        if self.heads is not None:
            _check_indices("attention heads", self.heads, None)
            if not self.heads:
                raise ArchitectureError("attention heads: found none, expected one or more; the kind without is skip")
        for name in ("query_key_rank", "value_rank"):
            rank = getattr(self, name)
            if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
                raise ArchitectureError(f"attention {name}: found {rank!r}, expected a whole number, 1 or more")

    @classmethod
    def narrow(cls, rank: int) -> Attention:
        """Return attention with so many dimensions of queries, keys and values in every head."""
        return cls("msa", query_key_rank=rank, value_rank=rank)

    def narrowed(self) -> bool:
        """Return whether the layer keeps some of its heads or dimensions only."""
        return any(getattr(self, name) is not None for name in NARROWINGS)

    def __str__(self) -> str:
        parts = [self.kind]
        if self.heads is not None:
            parts.append(f"{len(self.heads)} heads")
        if self.query_key_rank is not None or self.value_rank is not None:
            parts.append(f"{self.query_key_rank or 'all'}/{self.value_rank or 'all'}")
        return " ".join(parts)


@dataclass(frozen=True)
class FFN:
    """Which hidden units of one FFN stay."""

    width: int
    """Hidden units of the FFN before pruning."""
    units: tuple[int, ...]
    """Indices of the units kept, ascending."""

    def __post_init__(self) -> None:
        if isinstance(self.width, bool) or not isinstance(self.width, int) or self.width < 1:
            raise ArchitectureError(f"FFN width: found {self.width!r}, expected a whole number of units, 1 or more")
        _check_indices("FFN units", self.units, self.width)

    @classmethod
    def whole(cls, width: int) -> FFN:
        """Return an FFN that keeps all of its units."""
        return cls(width, tuple(range(width)))


@dataclass(frozen=True)
class Block:
    """One transformer block: its attention and its FFN."""

    attention: Attention
    ffn: FFN
    tokens: str = "all"
    """Whose output the block computes: `all`, or those of the `prefix` alone, where nothing reads the others. That
    goes with the last block, and with attention of kind msa or skip; keys and values come from all tokens still."""

    def __post_init__(self) -> None:
        _check_known("block tokens", self.tokens, TOKENS)
        if self.tokens == "prefix" and self.attention.kind not in ("msa", "skip"):
            raise ArchitectureError(
                f"tokens prefix goes with attention kinds msa and skip only, found it with {self.attention.kind}"
            )


class Rules(NamedTuple):
    """What convolutions do to prefix tokens, and what skipped layers add."""

    prefix: str = "identity"
    skip: str = "zero"


PUBLISHED = Rules()
"""The rules of a search as published."""
REPAIRED = Rules("linear", "mean")
"""The rules that a repair serves best."""


@dataclass(frozen=True)
class Architecture:
    """What every block of a network keeps.

    `str(architecture)` is a table; `to_json` and `from_json` are exact inverses.
    """

    blocks: tuple[Block, ...]
    prefix_rule: str = "identity"
    """What a convolution does to prefix tokens: `identity` passes the layer's own (normalised) input on, as published;
    `linear` maps them by two linear layers as narrow as the convolution."""
    skip_rule: str = "zero"
    """What a skipped layer adds: `zero`, `normalised_input` as in the published fine-tuned checkpoints, or `mean`, a
    vector for each prefix token and one for all grid tokens."""

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ArchitectureError("an architecture needs at least one block, found none")
        for index, block in enumerate(self.blocks[:-1]):
            if block.tokens != "all":
                raise ArchitectureError(
                    f"block {index}: found tokens {block.tokens}, expected all; only the last block's may go unread"
                )
        _check_known("prefix_rule", self.prefix_rule, PREFIX_RULES)
        _check_known("skip_rule", self.skip_rule, SKIP_RULES)

    @property
    def rules(self) -> Rules:
        """Both rules together."""
        return Rules(self.prefix_rule, self.skip_rule)

    def kinds(self) -> tuple[str, ...]:
        """Return the attention kind of every block."""
        return tuple(block.attention.kind for block in self.blocks)

    def widths(self) -> tuple[int, ...]:
        """Return the number of FFN units kept in every block."""
        return tuple(len(block.ffn.units) for block in self.blocks)

    def __str__(self) -> str:
        """Return a table by block; `msa 16/24` has queries and keys of 16 dimensions a head and values of 24."""
        names = [str(block.attention) for block in self.blocks]
        width = max(len("attention"), *(len(name) for name in names))
        lines = [f"block  {'attention':<{width}}  FFN units"]
        for index, (block, name) in enumerate(zip(self.blocks, names)):
            units = f"{len(block.ffn.units)} of {block.ffn.width}"
            tokens = "" if block.tokens == "all" else ", for prefix tokens alone"
            lines.append(f"{index:>5}  {name:<{width}}  {units}{tokens}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return the architecture as JSON text, one block a line."""
        written: list[dict[str, Any]] = [
            {"attention": {"kind": block.attention.kind, **to_data(block.attention)}, "ffn": vars(block.ffn)}
            for block in self.blocks
        ]
        if self.blocks[-1].tokens != "all":  # left out elsewhere, so that older versions read the file
            written[-1]["tokens"] = self.blocks[-1].tokens
        blocks = ",\n    ".join(map(json.dumps, written))
        return (
            "{\n"
            f'  "format": "{FORMAT}",\n  "version": {VERSION},\n'
            f'  "prefix_rule": "{self.prefix_rule}",\n  "skip_rule": "{self.skip_rule}",\n'
            f'  "blocks": [\n    {blocks}\n  ]\n}}\n'
        )

    @staticmethod
    def from_json(text: str) -> Architecture:
        """Read an architecture from JSON text.

        Raises:
            ArchitectureError: the text is not JSON, or has unknown, missing or ill-valued fields.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ArchitectureError(f"not an architecture: the text is not valid JSON ({error})") from error
        return architecture_from_dict(data)

    @staticmethod
    def load(path: str | Path) -> Architecture:
        """Read an architecture file. Raises ArchitectureError naming the file."""
        try:
            return Architecture.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ArchitectureError) as error:
            raise ArchitectureError(f"architecture file {path}: {error}") from error


def dense(widths: Sequence[int]) -> Architecture:
    """Return the architecture that keeps everything of a host whose blocks have FFNs of these widths."""
    return Architecture(tuple(Block(Attention(), FFN.whole(width)) for width in widths))


def architecture_from_dict(data: Any) -> Architecture:
    """Build an architecture from parsed JSON. Raises ArchitectureError naming the field that is wrong."""
    try:
        found: Architecture = from_data(Architecture, fields_of(data, FORMAT, VERSION), "architecture")
        return found
    except CheckpointError as error:
        raise ArchitectureError(f"not an architecture: {error}") from error
