"""What a decision by scores must leave alone: layers that stay whole, kinds, widths. Data, and what follows at a host.

A place is a block's index (`0`, `-1`), a range of indices (`0-2`), `attention` or `ffn` for all such layers, or a
dotted name in the host with wildcards: `blocks.11`, `*.mlp`, `blocks.1?.attn`.
"""

# Settings inherit from the class here: jsonargparse reads its types, and its docstrings are the command line's help.
import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Any

from spvit.architecture import KINDS, Attention
from spvit.errors import ConstraintError
from spvit.hosts.host import Host

PARTS = ("attention", "ffn")
NARROW = "narrow"
Places = int | str | tuple[int | str, ...] | None
Site = tuple[int, str]
"""A block's index and one of its parts."""


@dataclass(frozen=True)
class Allowed:
    """What one block may become; its attention may always stay whole."""

    whole: bool = False
    """Whether its attention has to."""
    forbidden: frozenset[str] = frozenset()
    """Kinds that may not stand where its attention is, `narrow` for fewer heads or dimensions."""
    least_units: int = 1
    """Fewest units that its FFN keeps."""

    def takes(self, kept: Attention) -> bool:
        """Return whether this may stand where the block's attention is."""
        kind = NARROW if kept.narrowed() else kept.kind
        return kept == Attention() or not (self.whole or kind in self.forbidden)


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What a decision by scores leaves alone. Several places or kinds are a tuple, or text with commas or spaces.

    Raises ConstraintError when a value is malformed. Whether places exist is found out at a host.
    """

    keep: Places = None
    """Places that stay whole: block indices (0 -1), ranges (0-2), attention, ffn, or dotted names with wildcards
    (blocks.11.*, "*.mlp")."""
    only: Places = None
    """The only places that may change, in the same forms."""
    forbid: str | tuple[str, ...] | None = None
    """Kinds that may not replace attention: narrow (fewer heads or dimensions), conv3, conv1, skip. KIND:PLACE forbids
    one there alone (skip:0-2)."""
    smallest_width: int | float | str | None = None
    """Fewest units that an FFN keeps: a share of its own (25%), or a number."""
    keep_patches: bool = False
    """Whether the last block computes its patch tokens even where the objective reads none of them."""

    def __post_init__(self) -> None:
        for name in ("keep", "only", "forbid"):
            object.__setattr__(self, name, _listed(name, getattr(self, name)))
        known = (NARROW, *list(KINDS)[1:])
        for item in _listed("forbid", self.forbid):
            kind = str(item).partition(":")[0]
            if kind not in known:
                hint = "the layer as it was cannot be forbidden" if kind == "msa" else _nearest(kind, known)
                raise ConstraintError(f"forbid {item!r}: expected a kind, {', '.join(known)}; {hint}")
        if self.smallest_width is not None:
            _least_units(self.smallest_width, 1)

    def given(self) -> dict[str, str]:
        """Return by name what is constrained, in words."""
        values = {field.name: getattr(self, field.name) for field in fields(Constraints)}
        lists = {name: value if isinstance(value, tuple) else (value,) for name, value in values.items() if value}
        return {name: f"{name} {', '.join(map(str, value))}" for name, value in lists.items()}

    def at(self, host: Host) -> tuple[Allowed, ...]:
        """Return what every block of a host may become. Raises ConstraintError: a place or width is not there."""
        kept = _found(host, "keep", self.keep)
        only = _found(host, "only", self.only)
        if only:
            kept |= _found(host, "only", PARTS) - only
        banned = set()
        for item in map(str, _listed("forbid", self.forbid)):
            kind, _, place = item.partition(":")
            there = {site for site in _found(host, f"forbid {kind}", place or "attention") if site[1] == "attention"}
            if not there:
                raise ConstraintError(f"forbid {item!r}: {place} has no attention layer, expected one to forbid it at")
            banned |= {(index, kind) for index, _ in there}
        units = [block.ffn.units for block in host.blocks]
        least = [1 if self.smallest_width is None else _least_units(self.smallest_width, count) for count in units]
        if min(least) > max(units):
            found = f"the FFNs of {host.name} have {max(units)} units at most"
            raise ConstraintError(f"smallest_width is {self.smallest_width}, but {found}")
        allowed = []
        for index, count in enumerate(units):
            forbidden = frozenset(kind for other, kind in banned if other == index)
            width = count if (index, "ffn") in kept else min(least[index], count)
            allowed.append(Allowed((index, "attention") in kept, forbidden, width))
        return tuple(allowed)


def _listed(name: str, value: object) -> tuple[int | str, ...]:
    """Return places or kinds one by one. Raises ConstraintError naming one that is neither a number nor text."""
    if isinstance(value, str):
        value = re.split(r"[,\s]+", value.strip(" ,"))
    items: list[Any] = [] if value is None else list(value) if isinstance(value, Iterable) else [value]
    for item in items:
        if isinstance(item, bool) or not isinstance(item, (int, str)) or item == "":
            raise ConstraintError(f"{name}: found {item!r}, expected block indices or names")
    return tuple(int(item) if re.fullmatch(r"-?\d+", str(item)) else item for item in items)


def _least_units(width: int | float | str, units: int) -> int:
    """Return the fewest units that an FFN of so many keeps. Raises ConstraintError when the width is malformed."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)(%?)", str(width))
    number = Fraction(match[1]) / (100 if match[2] else 1) if match else Fraction(0)
    share = match is not None and (match[2] == "%" or number < 1)
    if number <= 0 or (share and number > 1) or not (share or "." not in str(width)):
        raise ConstraintError(f"smallest_width is {width!r}, expected a share of the units (25%) or a whole number")
    return math.ceil(number * units) if share else int(number)


def _nearest(name: str, known: Iterable[str]) -> str:
    return f"did you mean {difflib.get_close_matches(name, list(known), n=1, cutoff=0)[0]!r}?"


def _found(host: Host, name: str, places: Places) -> set[Site]:
    """Return the sites at some places. Raises ConstraintError naming a place where there is none."""
    count = len(host.blocks)
    names = {(index, part): _names(host, index, part) for index in range(count) for part in PARTS}
    found: set[Site] = set()
    for place in _listed(name, places):
        indices = re.fullmatch(r"(-?\d+)(?:-(-?\d+))?", str(place))
        if indices:
            first, last = (
                int(end) % count if -count <= int(end) < 0 else int(end) for end in indices.groups(indices[1])
            )
            if not 0 <= first <= last < count:
                raise ConstraintError(
                    f"{name} {place}: {host.name} has blocks 0 to {count - 1}, or -{count} to -1 from the end"
                )
            there = {(index, part) for index in range(first, last + 1) for part in PARTS}
        else:
            there = {site for site, own in names.items() if any(fnmatchcase(other, str(place)) for other in own)}
        if not there:
            hint = _nearest(str(place), [known for own in names.values() for known in own])
            raise ConstraintError(f"{name} {place!r} matches no block, attention layer or FFN of {host.name}; {hint}")
        found |= there
    return found


def _names(host: Host, index: int, part: str) -> list[str]:
    """Return what a site may be called: its part, its path in the host, and what it is inside of, up to its block."""
    block = host.blocks[index]
    steps = (block.attention.path if part == "attention" else block.ffn.second).split(".")
    paths = [".".join(steps[:end]) for end in range(len(block.path.split(".")) + 1, len(steps) + 1)]
    return [part, block.path, *paths]
