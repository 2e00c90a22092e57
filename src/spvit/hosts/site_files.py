"""Sites to and from JSON values, field by field and strictly; blocks that differ in their number alone are one entry.

Fields that have their default are left out. Where a field may be of several dataclasses, `class` names which it is.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import types
from collections.abc import Iterator, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from spvit.errors import CheckpointError
from spvit.hosts.sites import BlockSites

NUMBER = "{}"
"""Stands for a block's number in names."""
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def to_data(value: Any, hint: Any = None) -> Any:
    """Return a dataclass, or a value of a type that its fields may have, as JSON values.

    Raises:
        CheckpointError: a field holds what no file can.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        data = {"class": type(value).__name__} if hint is not None and _classes(hint) != [type(value)] else {}
        hints = get_type_hints(type(value))
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if item != _default(field):
                data[field.name] = to_data(item, hints[field.name])
        return data
    if isinstance(value, (tuple, list)):
        if BlockSites in get_args(hint):
            return _together(value)
        inner = next((part for part in _options(hint) if get_origin(part) is tuple), None)
        return [to_data(item, part) for item, part in zip(value, _items(inner, len(value)) if inner else ())]
    if not isinstance(value, tuple(_WORDS)):
        raise CheckpointError(f"{type(value).__name__} {value!r} of a site cannot be written to a file")
    return value


def from_data(hint: Any, data: Any, where: str) -> Any:
    """Return a value of a type, a dataclass among them, from JSON values; the inverse of `to_data`.

    Raises:
        CheckpointError: names the field that is unknown, missing, or of another type.
    """
    options = _options(hint)
    tuples = [part for part in options if get_origin(part) is tuple]
    if isinstance(data, dict) and _classes(hint):
        return _dataclass_from(hint, data, where)
    if isinstance(data, list) and tuples:
        if BlockSites in get_args(tuples[0]):
            data = list(_apart(data, where))
        parts = _items(tuples[0], len(data))
        if len(parts) == len(data):
            pairs = enumerate(zip(parts, data))
            return tuple(from_data(part, item, f"{where}[{index}]") for index, (part, item) in pairs)
    elif type(data) in options:
        return data
    elif float in options and type(data) is int:
        return float(data)
    known = [_WORDS.get(part, "a list" if part in tuples else "an object") for part in options]
    lengths = [f" of {len(get_args(part))}" for part in tuples if Ellipsis not in get_args(part)]
    raise CheckpointError(f"{where} is {data!r}, expected {' or '.join(dict.fromkeys(known))}{''.join(lengths)}")


def _dataclass_from(hint: Any, data: dict[str, Any], where: str) -> Any:
    classes = {cls.__name__: cls for option in _classes(hint) for cls in _with_subclasses(option)}
    name = data.get("class", next(iter(classes)))
    if name not in classes:
        raise CheckpointError(f"{where}.class is {name!r}, expected one of {', '.join(classes)}")
    cls = classes[name]
    fields, hints = {field.name: field for field in dataclasses.fields(cls)}, get_type_hints(cls)
    given = {key: value for key, value in data.items() if key != "class"}
    for key in given:
        if key not in fields:
            raise CheckpointError(f"{where}: unknown field {key!r}, expected {', '.join(fields)}")
    for key, field in fields.items():
        if key not in given and _default(field) is dataclasses.MISSING:
            raise CheckpointError(f"{where}: field {key!r} is missing")
    return cls(**{key: from_data(hints[key], value, f"{where}.{key}") for key, value in given.items()})


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


def _together(blocks: Sequence[BlockSites]) -> list[dict[str, Any]]:
    return [{**({"numbers": numbers} if numbers else {}), **to_data(pattern)} for pattern, numbers in alike(blocks)]


def _apart(data: list[Any], where: str) -> Iterator[Any]:
    """Yield the JSON values of each block of those that `_together` wrote."""
    for entry in data:
        if not isinstance(entry, dict) or "numbers" not in entry:
            yield entry
            continue
        numbers = from_data(tuple[int, ...], entry["numbers"], f"{where}.numbers")
        for number in numbers:
            yield _numbered({key: value for key, value in entry.items() if key != "numbers"}, number)


def _numbered(value: Any, number: int) -> Any:
    if isinstance(value, dict):
        return {key: _numbered(item, number) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbered(item, number) for item in value]
    return value.replace(NUMBER, str(number)) if isinstance(value, str) else value


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _classes(hint: Any) -> list[type]:
    return [part for part in _options(hint) if dataclasses.is_dataclass(part) and isinstance(part, type)]


def _with_subclasses(cls: type[Any]) -> list[type[Any]]:
    inside = (_with_subclasses(own) for own in cls.__subclasses__())
    return [cls, *itertools.chain(*inside)]


def _items(hint: Any, count: int) -> tuple[Any, ...]:
    """Return the types of the items of a tuple of so many."""
    parts = get_args(hint)
    return parts[:1] * count if Ellipsis in parts else parts


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
