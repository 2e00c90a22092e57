"""The families of hosts that spvit supports, found by class name: no model library is loaded before it is used."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from torch import nn

from spvit.errors import UnsupportedHostError
from spvit.hosts.base import Family


@dataclass(frozen=True)
class Registration:
    """How to recognise a family without importing its library."""

    package: str
    classes: tuple[str, ...]
    adapter: str
    library: str


def registrations() -> tuple[Registration, ...]:
    """Return every supported family."""
    return (
        Registration("timm", ("VisionTransformer", "VisionTransformerDistilled"), "spvit.hosts.timm_vit", "timm"),
        Registration("timm", ("SwinTransformer",), "spvit.hosts.timm_swin", "timm"),
        Registration("transformers", ("ViTForImageClassification",), "spvit.hosts.hf_vit", "transformers"),
    )


def family_of(host: nn.Module) -> Family:
    """Return the family of a host.

    Raises:
        UnsupportedHostError: names the model's class and the supported families.
    """
    cls = type(host)
    package = cls.__module__.split(".")[0]
    for registration in registrations():
        if package == registration.package and cls.__name__ in registration.classes:
            return _adapter(registration)
    supported = "; ".join(f"{item.library}: {', '.join(item.classes)}" for item in registrations())
    raise UnsupportedHostError(
        f"{cls.__module__}.{cls.__name__} is not a supported model family; supported are {supported}"
    )


def family_of_library(library: str, model_class: str | None = None) -> Family:
    """Return the family that a saved model's host came from.

    Args:
        library: which library the host's class is in.
        model_class: name of that class. None, as files had it when a library had one family, means its first one.

    Raises:
        UnsupportedHostError: names what is unknown and what is known.
    """
    found = [item for item in registrations() if item.library == library]
    if not found:
        known = ", ".join(dict.fromkeys(item.library for item in registrations()))
        raise UnsupportedHostError(f"the host's library {library!r} is unknown, expected one of {known}")
    for registration in found:
        if model_class is None or model_class in registration.classes:
            return _adapter(registration)
    known = ", ".join(name for item in found for name in item.classes)
    raise UnsupportedHostError(f"the host's class {model_class!r} of {library} is unknown, expected one of {known}")


def _adapter(registration: Registration) -> Family:
    family: Family = importlib.import_module(registration.adapter).FAMILY
    return family
