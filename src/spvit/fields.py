"""Frozen dataclasses to and from JSON values, field by field and strictly: the one reader of the files of spvit.

Fields that have their default are left out. Where a field may be of several dataclasses, `class` names which it is.
This file imports the standard library only.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from spvit.errors import CheckpointError, SpvitError

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}

Read = TypeVar("Read")


def from_file(cls: type[Read], path: str | Path, form: str, version: int) -> Read:
    """Return what a JSON file of a format holds. Raises OSError, or a ValueError that says what is wrong with it."""
    return from_data(cls, fields_of(json.loads(Path(path).read_text(encoding="utf-8")), form, version), form)


def fields_of(data: Any, form: str, version: int) -> dict[str, Any]:
    """Return what a JSON object holds beside its format and version. Raises CheckpointError when these are others."""
    found = data if isinstance(data, dict) else {}
    if (found.get("format"), found.get("version")) != (form, version):
        raise CheckpointError(f'expected "format": "{form}", "version": {version}')
    return {key: value for key, value in found.items() if key not in ("format", "version")}


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
        inner = next((part for part in _options(hint) if get_origin(part) is tuple), None)
        return [to_data(item, part) for item, part in zip(value, _items(inner, len(value)) if inner else ())]
    if not isinstance(value, tuple(_WORDS)):
        raise CheckpointError(f"{type(value).__name__} {value!r} cannot be written to a file")
    return value


def from_data(hint: Any, data: Any, where: str) -> Any:
    """Return a value of a type, a dataclass among them, from JSON values; the inverse of `to_data`.

    Raises:
        CheckpointError: names the field that is unknown, missing, or of another type.
        SpvitError: what a dataclass raises for its values, behind their place.
    """
    options = _options(hint)
    tuples = [part for part in options if get_origin(part) is tuple]
    mappings = [part for part in options if get_origin(part) in (dict, Mapping)]
    if isinstance(data, dict) and mappings:
        part = get_args(mappings[0])[1]
        return {name: from_data(part, item, f"{where}.{name}") for name, item in data.items()}
    if isinstance(data, dict) and _classes(hint):
        return _dataclass_from(hint, data, where)
    if isinstance(data, list) and tuples:
        parts = _items(tuples[0], len(data))
        if len(parts) == len(data):
            plain = set(parts) <= {int, float, str} and all(type(item) is parts[0] for item in data)
            pairs = enumerate(zip(parts, data))
            return tuple(data if plain else (from_data(part, item, f"{where}[{at}]") for at, (part, item) in pairs))
    elif type(data) in options or Any in options:
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
    values = {key: from_data(hints[key], value, f"{where}.{key}") for key, value in given.items()}
    try:
        return cls(**values)
    except SpvitError as error:
        raise type(error)(f"{where}: {error}") from error


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
