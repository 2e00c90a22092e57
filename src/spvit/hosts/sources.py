"""How a dense model is described in a file, and made again: by the library that made it, or not at all.

Nothing that a file says is imported or run: it names models of timm and classes of transformers, with plain arguments.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from spvit.errors import UnsupportedHostError

LIBRARIES = {"timm": "spvit.hosts.timm_models", "transformers": "spvit.hosts.transformers_models"}


def source_of(model: nn.Module) -> dict[str, Any]:
    """Return what `build` needs to make the same dense model again, as JSON values; of other models their class."""
    cls = type(model)
    library = cls.__module__.split(".")[0]
    known = importlib.import_module(LIBRARIES[library]).source_of(model) if library in LIBRARIES else None
    return known or {"library": library, "class": f"{cls.__module__}.{cls.__qualname__}"}


def can_build(source: Mapping[str, Any]) -> bool:
    """Return whether `build` may make a model from what `source_of` returned."""
    return source["library"] in LIBRARIES and ("name" in source or "config" in source)


def build(source: dict[str, Any]) -> nn.Module:
    """Make a dense model with random weights from what `source_of` returned.

    Raises:
        UnsupportedHostError: no library can make it, or it makes a model of another class.
        ModelError: the file names what is no model of its library, or asks for code.
    """
    library = source["library"]
    if not can_build(source):
        raise UnsupportedHostError(
            f"the file names no model of {' or '.join(LIBRARIES)} but a {source.get('class', library)}, which cannot "
            "be made from a file; make the dense model and pass it: spvit.load(folder, host=model)"
        )
    model: nn.Module = importlib.import_module(LIBRARIES[library]).build(source)
    found, expected = type(model).__name__, source.get("class")
    if expected not in (None, found):
        raise UnsupportedHostError(f"the host's class is {expected!r}, but what {library} makes is a {found}")
    return model
