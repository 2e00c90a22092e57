"""The families of hosts that spvit supports, found by class name: no model library is loaded before it is used."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass

from torch import nn

from spvit.errors import UnsupportedHostError
from spvit.hosts.sites import Family


@dataclass(frozen=True)
class Registration:
    """How to recognise a family without importing its library."""

    library: str
    classes: tuple[str, ...]
    adapter: str


REGISTRATIONS = (
    Registration("timm", ("VisionTransformer", "VisionTransformerDistilled"), "spvit.hosts.timm_vit"),
    Registration("timm", ("SwinTransformer",), "spvit.hosts.timm_swin"),
    Registration("transformers", ("ViTForImageClassification",), "spvit.hosts.hf_vit"),
)


def family_of(model: nn.Module) -> Family:
    """Return the family of a model.

    Raises:
        UnsupportedHostError: names the model's class, and the part of it to pass or the supported families.
    """
    registration = _registration_of(model)
    if registration is not None:
        return _adapter(registration)
    cls = type(model)
    raise UnsupportedHostError(f"{cls.__module__}.{cls.__qualname__} is not a supported model family; {_advice(model)}")


def _registration_of(model: nn.Module) -> Registration | None:
    cls = type(model)
    library = cls.__module__.split(".")[0]
    return next((item for item in REGISTRATIONS if library == item.library and cls.__name__ in item.classes), None)


def _advice(model: nn.Module) -> str:
    """Return what to do with a model of no supported class."""
    if hasattr(model, "merge_and_unload"):
        return "it wraps a model with adapters: pass model.merge_and_unload()"
    inside = next((name for name, part in model.named_modules() if name and _registration_of(part)), None)
    if inside is not None:
        cls = type(model.get_submodule(inside)).__name__
        expression = re.sub(r"\.(\d+)", r"[\1]", f"model.{inside}")
        return f"its {cls} inside is: pass {expression}"
    supported = {library: [] for library in (item.library for item in REGISTRATIONS)}  # type: dict[str, list[str]]
    for item in REGISTRATIONS:
        supported[item.library] += item.classes
    return "supported are " + "; ".join(f"{library}: {', '.join(names)}" for library, names in supported.items())


def family_of_library(library: str, model_class: str | None = None) -> Family:
    """Return the family that a saved model's host came from, by its library and class (None: the library's first one).

    Raises UnsupportedHostError naming what is unknown and what is known.
    """
    found = [item for item in REGISTRATIONS if item.library == library]
    if not found:
        known = ", ".join(dict.fromkeys(item.library for item in REGISTRATIONS))
        raise UnsupportedHostError(f"the host's library {library!r} is unknown, expected one of {known}")
    for registration in found:
        if model_class is None or model_class in registration.classes:
            return _adapter(registration)
    known = ", ".join(name for item in found for name in item.classes)
    raise UnsupportedHostError(f"the host's class {model_class!r} of {library} is unknown, expected one of {known}")


def _adapter(registration: Registration) -> Family:
    family: Family = importlib.import_module(registration.adapter).FAMILY
    return family
