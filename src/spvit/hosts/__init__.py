"""The families of hosts that spvit supports, found by class name: no model library is loaded before it is used."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from torch import nn

from spvit.hosts.base import Family, UnsupportedHostError


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


def family_of_library(library: str) -> Family:
    """Return the family that a saved model's host came from. Raises UnsupportedHostError."""
    for registration in registrations():
        if registration.library == library:
            return _adapter(registration)
    known = ", ".join(item.library for item in registrations())
    raise UnsupportedHostError(f"the host's library {library!r} is unknown, expected one of {known}")


def _adapter(registration: Registration) -> Family:
    family: Family = importlib.import_module(registration.adapter).FAMILY
    return family
