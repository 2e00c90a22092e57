"""How models of transformers are described and made again (extra `hf`): a class of its own, and its settings."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import transformers
from torch import nn

from spvit.errors import ModelError

# Implementations of attention that come with transformers; it would download and run any other.
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_OF_OLD_FILES = "ViTForImageClassification"
_POOLING = "add_pooling_layer"


def source_of(model: Any) -> dict[str, Any] | None:
    """Return a model's class and settings as JSON values; None for one that cannot be made from these."""
    cls = type(model)
    if getattr(transformers, cls.__name__, None) is not cls or not issubclass(cls, transformers.PreTrainedModel):
        return None
    source = {
        "library": "transformers",
        "class": cls.__name__,
        "config": model.config.to_diff_dict(),
        "attention": model.config._attn_implementation,
    }
    if _POOLING in inspect.signature(cls).parameters and getattr(model, "pooler", None) is None:
        source["pooling"] = False
    return source


def build(source: dict[str, Any]) -> nn.Module:
    """Make a model with random weights from what `source_of` returned. Raises ModelError when that asks for code."""
    cls, config = _class_named(source.get("class", _OF_OLD_FILES)), source["config"]
    asked = {source["attention"], *(str(value) for key, value in _settings(config) if "implementation" in key)}
    if not asked <= {"None", *_ATTENTION} or any(key == "auto_map" for key, _ in _settings(config)):
        raise ModelError(f"its configuration asks for code of others: {config.get('auto_map', sorted(asked))}")
    for key, value in _settings(config):  # what timm would make, or be told to read
        if (value and "backbone" in key) or (key == "model_type" and str(value).startswith("timm")):
            raise ModelError(f"its configuration asks for code of others: {key}={value!r}")
    settings: Any = cls.config_class.from_dict(config, attn_implementation=source["attention"])
    model: nn.Module = cls(settings, **({} if source.get("pooling", True) else {_POOLING: False}))
    return model


def _class_named(name: Any) -> Any:
    """Return a class of models of images that is defined in transformers and holds no model of another library."""
    cls = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise ModelError(f"{name!r} is no model that comes with transformers")
    of_images = getattr(cls, "main_input_name", None) == "pixel_values" and ".timm_" not in cls.__module__
    if not cls.__module__.startswith("transformers.models.") or not of_images:
        raise ModelError(f"{name!r} is no model of images that transformers makes itself")
    return cls


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield all settings of a configuration, of those inside it too."""
    for key, value in config.items():
        yield str(key), value
        if isinstance(value, dict):
            yield from _settings(value)
