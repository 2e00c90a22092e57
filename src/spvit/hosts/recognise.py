"""Finds the family of a model: by its class, so that no model library is loaded before it is used, or by behaviour."""

from __future__ import annotations

import copy
import importlib
import re
from typing import Any

import torch
from torch import nn

from spvit.errors import UnknownPartError, UnsupportedHostError
from spvit.hosts.behaviour.discover import discover
from spvit.hosts.declared import Sites
from spvit.hosts.family import Family

RECORD = "spvit_record"
"""Attribute in which a searchable or pruned model keeps what spvit knows of it, its family among that."""


WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
"""Classes of torch that wrap a model, and under which name."""
DECLARED: dict[type[nn.Module], Sites] = {}
"""What users declare, by class."""

ADAPTERS = {
    ("timm", "VisionTransformer"): "spvit.hosts.timm_vit",
    ("timm", "VisionTransformerDistilled"): "spvit.hosts.timm_vit",
    ("timm", "SwinTransformer"): "spvit.hosts.timm_swin",
}
"""Where the family of a class is made, by library and name: nothing is imported before it is used."""


def family_of(model: nn.Module, size: tuple[int, int, int] | None = None) -> Family:
    """Return the family of a model: by its class where spvit knows it, or else found by what it does.

    Args:
        model: dense, searchable or pruned.
        size: (channels, height, width) of its images; None: as the model says.

    Raises:
        UnsupportedHostError: names the model's class, and what was looked for and found, or the part of it to pass.
    """
    odd = None
    try:
        known = known_family(model)
        if known is not None:
            return known
    except UnknownPartError as error:
        odd = f"{error}; and "
    declared = _declared_for(model)
    try:
        if declared is not None:
            family = discover(_with_values(model), size or declared.input_size or size_of(model), declared)
            declared.check(model, family.sites)
            return family
        advice = None if odd else _advice(model)
        if advice is not None:
            raise UnsupportedHostError(advice)
        return discover(_with_values(model), size or size_of(model))
    except UnsupportedHostError as error:
        cls = type(model)
        said = f"{cls.__module__}.{cls.__qualname__} is not supported: {odd or ''}"
        if declared is not None:
            said = f"the sites registered for {cls.__qualname__} do not hold: "
        raise UnsupportedHostError(f"{said}{error}") from error


def known_family(model: nn.Module) -> Family | None:
    """Return the family of a model that is known without running it, by its record or its class; None for others.

    Raises UnknownPartError for a model of a known class with a part that is not the family's own.
    """
    record = vars(model).get(RECORD)
    adapter = _adapter_of(model)
    if record is None and (adapter is None or _declared_for(model) is not None):
        return None
    family: Family = record.family if record is not None else importlib.import_module(str(adapter)).family(model)
    return family


def register(cls: type[nn.Module], sites: Sites | None) -> None:
    """Declare where the layers of a class of models are, its subclasses included; every verb then takes its models.

    What is declared is verified on each model: attention must compute what the named projections give, each FFN unit
    must act alone, tokens must be patches behind prefix tokens. It holds for this process.

    Args:
        cls: the class of the whole model.
        sites: the names; None takes a declaration back.

    Raises:
        UnsupportedHostError: cls is no class of models. Wrong names raise it when a model of the class is used.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise UnsupportedHostError(f"register takes a class of models, found {cls!r}; pass type(model)")
    if sites is None:
        DECLARED.pop(cls, None)
    else:
        DECLARED[cls] = sites


def _declared_for(model: nn.Module) -> Sites | None:
    return next((DECLARED[cls] for cls in type(model).__mro__ if cls in DECLARED), None)


def _with_values(model: nn.Module) -> nn.Module:
    """Return a model that can run: of one on the meta device a copy with random weights, which recognition may have."""
    if not any(parameter.is_meta for parameter in model.parameters()):
        return model
    buffer = next((name for name, buffer in model.named_buffers() if buffer.is_meta), None)
    if buffer is not None:
        raise UnsupportedHostError(f"it is on the meta device, where {buffer} has no values; load its weights first")
    twin = copy.deepcopy(model).to_empty(device="cpu").float()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.normal_(0, parameter[0].numel() ** -0.5) if parameter.dim() > 1 else parameter.normal_(1, 0.1)
    return twin


def size_of(model: nn.Module) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that a model says it takes. Raises UnsupportedHostError."""
    channels, size = said_size(model)
    if size is None:
        raise UnsupportedHostError(
            "it does not say what images it takes; pass some, spvit.recognise(model, images), or give it an attribute "
            "image_size"
        )
    return (channels, *size)


def said_size(model: Any) -> tuple[int, tuple[int, int] | None]:
    """Return how many channels the images of any model have, and (height, width) as it says; None if it does not."""
    config = getattr(model, "config", None)
    described = getattr(model, "pretrained_cfg", None) or {}
    sides = [getattr(config, "image_size", None)]
    for part in model.modules():
        sides += [getattr(part, name, None) for name in ("image_size", "img_size")]
    sides += [described.get("input_size", (None,))[1:]]
    side = next((item for item in sides if isinstance(item, int) or _is_pair(item)), None)
    convolution = next((part for part in model.modules() if isinstance(part, nn.Conv2d)), None)
    channels = getattr(config, "num_channels", 3 if convolution is None else convolution.in_channels)
    return channels, (side, side) if isinstance(side, int) else side


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(item, int) for item in value)


def _adapter_of(model: nn.Module) -> str | None:
    cls = type(model)
    return ADAPTERS.get((cls.__module__.split(".")[0], cls.__name__))


def _advice(model: nn.Module) -> str | None:
    """Return what to do with a model that wraps one; None: it wraps none that is known."""
    if hasattr(model, "merge_and_unload"):
        return "it wraps a model with adapters: pass model.merge_and_unload()"
    inside = WRAPPERS.get(type(model).__name__)
    if inside is None:
        inside = next((name for name, part in model.named_modules() if name and _adapter_of(part)), None)
    if inside is None:
        return None
    cls = type(model.get_submodule(inside)).__name__
    expression = re.sub(r"\.(\d+)", r"[\1]", f"model.{inside}")
    return f"its {cls} inside is: pass {expression}"
