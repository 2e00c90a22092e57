"""What is known of a model, to and from JSON values; blocks that differ in their number alone are one entry."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from spvit.fields import from_data, to_data
from spvit.hosts.family import Family
from spvit.hosts.sites import BlockSites

NUMBER = "{}"
"""Stands for a block's number in names."""


def family_to_data(family: Family) -> dict[str, Any]:
    """Return a family as JSON values. Raises CheckpointError when a field holds what no file can."""
    together = [
        {**({"numbers": numbers} if numbers else {}), **to_data(pattern)} for pattern, numbers in alike(family.sites)
    ]
    return {**to_data(dataclasses.replace(family, sites=())), "sites": together}


def family_from_data(data: Any, where: str) -> Family:
    """Return the family that JSON values are of. Raises CheckpointError naming the field that is odd."""
    entries = data.get("sites") if isinstance(data, dict) else None
    if not isinstance(entries, list):
        return from_data(Family, data, where)
    family: Family = from_data(Family, {**data, "sites": []}, where)
    blocks = [block for index, entry in enumerate(entries) for block in _apart(entry, f"{where}.sites[{index}]")]
    return dataclasses.replace(family, sites=tuple(blocks))


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


def _apart(entry: Any, where: str) -> Iterator[BlockSites]:
    """Yield the blocks of one entry."""
    plain = {key: value for key, value in entry.items() if key != "numbers"} if isinstance(entry, dict) else entry
    pattern: BlockSites = from_data(BlockSites, plain, where)
    if plain is entry or "numbers" not in entry:
        yield pattern
        return
    for number in from_data(tuple[int, ...], entry["numbers"], f"{where}.numbers"):
        yield renamed(pattern, pattern.path, pattern.path.replace(NUMBER, str(number)))
