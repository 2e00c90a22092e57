"""Finds the family of a model: by its class, so that no model library is loaded before it is used, or by behaviour."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from spvit.errors import UnsupportedHostError
from spvit.hosts.behaviour.discover import discover
from spvit.hosts.sites import Family

RECORD = "spvit_record"
"""Attribute in which a searchable or pruned model keeps what spvit knows of it, its family among that."""


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


def family_of(model: nn.Module, size: tuple[int, int, int] | None = None) -> Family:
    """Return the family of a model: by its class where spvit knows it, or else found by what it does.

    Args:
        model: dense, searchable or pruned.
        size: (channels, height, width) of its images; None: as the model says.

    Raises:
        UnsupportedHostError: names the model's class, and what was looked for and found, or the part of it to pass.
    """
    record = vars(model).get(RECORD)
    if record is not None:
        family: Family = record.family
        return family
    registration = _registration_of(model)
    if registration is not None:
        return _adapter(registration)
    advice = _advice(model)
    try:
        if advice is not None:
            raise UnsupportedHostError(advice)
        return discover(model, size or _size_of(model))
    except UnsupportedHostError as error:
        cls = type(model)
        raise UnsupportedHostError(f"{cls.__module__}.{cls.__qualname__} is not supported: {error}") from error


def _size_of(model: Any) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that a model says it takes. Raises UnsupportedHostError."""
    config = getattr(model, "config", None)
    described = getattr(model, "pretrained_cfg", None) or {}
    sides = [getattr(config, "image_size", None)]
    for part in model.modules():
        sides += [getattr(part, name, None) for name in ("image_size", "img_size")]
    sides += [described.get("input_size", (None,))[1:]]
    side = next((item for item in sides if isinstance(item, int) or _is_pair(item)), None)
    convolution = next((part for part in model.modules() if isinstance(part, nn.Conv2d)), None)
    channels = getattr(config, "num_channels", 3 if convolution is None else convolution.in_channels)
    if side is None:
        raise UnsupportedHostError("it does not say what images it takes; pass some: spvit.recognise(model, images)")
    return (channels, side, side) if isinstance(side, int) else (channels, *side)


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(item, int) for item in value)


def _registration_of(model: nn.Module) -> Registration | None:
    cls = type(model)
    library = cls.__module__.split(".")[0]
    return next((item for item in REGISTRATIONS if library == item.library and cls.__name__ in item.classes), None)


def _advice(model: nn.Module) -> str | None:
    """Return what to do with a model that wraps one; None: it wraps none that is known."""
    if hasattr(model, "merge_and_unload"):
        return "it wraps a model with adapters: pass model.merge_and_unload()"
    inside = next((name for name, part in model.named_modules() if name and _registration_of(part)), None)
    if inside is None:
        return None
    cls = type(model.get_submodule(inside)).__name__
    expression = re.sub(r"\.(\d+)", r"[\1]", f"model.{inside}")
    return f"its {cls} inside is: pass {expression}"


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
