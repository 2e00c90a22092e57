"""How a dense model is described in a file, and made again: by the library that made it, or not at all.

Nothing that a file says is imported or run: it names models of timm and classes of transformers (extra `hf`), with
plain arguments.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import nn
from torch.torch_version import TorchVersion

from spvit.errors import ModelError, UnsupportedHostError

# Implementations of attention that come with transformers; it would download and run any other.
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_POOLING = "add_pooling_layer"


def source_of(model: nn.Module) -> dict[str, Any]:
    """Return what `build` needs to make the same dense model again, as JSON values; of other models their class."""
    cls = type(model)
    library = cls.__module__.split(".")[0]
    known = LIBRARIES[library][0](model) if library in LIBRARIES else None
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
            + ("; models that timm 1.0.31 or newer made have their arguments saved" if library == "timm" else "")
        )
    model: nn.Module = LIBRARIES[library][1](source)
    found, expected = type(model).__name__, source.get("class")
    if expected != found:
        raise UnsupportedHostError(f"the host's class is {expected!r}, but what {library} makes is a {found}")
    return model


def _of_timm(model: Any) -> dict[str, Any] | None:
    """Return how timm made a model; None if timm.create_model did not, or with values that no file can hold."""
    config = getattr(model, "pretrained_cfg", None)
    keep_arguments(model)
    arguments = getattr(model, "_model_args", None)
    if not config or arguments is None:
        return None
    # reset_classifier leaves the recorded arguments as they were, and so does set_input_size before timm 1.0.31.
    now = {name: value for name, value in _read(model).items() if name in {*arguments, "num_classes", "global_pool"}}
    arguments = {**arguments, **now}
    plain = (str, int, float, bool, list, tuple, dict, type(None))
    if not all(isinstance(value, plain) for value in arguments.values()):
        return None
    arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    about = {"library": "timm", "class": type(model).__name__, "name": config["architecture"]}
    return {**about, "arguments": arguments}


def _by_timm(source: dict[str, Any]) -> nn.Module:
    check_timm_model(source["name"], source["arguments"])
    return make_by_timm(source["name"], **source["arguments"])


def make_by_timm(name: str, **arguments: Any) -> nn.Module:
    """Return what `timm.create_model` makes, with a note of its arguments, which timm itself keeps from 1.0.31 on."""
    import timm

    model: Any = timm.create_model(name, **arguments)
    if not hasattr(model, "_model_args"):
        model._model_args = {**_read(model), **{key: v for key, v in arguments.items() if key != "pretrained"}}
    return model


def keep_arguments(model: Any) -> None:
    """Note the arguments of a dense model that timm before 1.0.31 made, read off it; none where these make another."""
    if getattr(model, "pretrained_cfg", None) and not hasattr(model, "_model_args"):
        with suppress(Exception), without_weights("timm"):  # whatever timm raises for arguments that do not fit
            read = _read(model)
            if _made(make_by_timm(model.pretrained_cfg["architecture"], **read)) == _made(model):
                model._model_args = read


def _read(model: Any) -> dict[str, Any]:
    """Return the usual arguments of timm.create_model, as a model tells them now."""
    embed = getattr(model, "patch_embed", None)
    read = {name: getattr(model, name, None) for name in ("num_classes", "global_pool", "dynamic_img_size")}
    read |= {name: getattr(embed, name, None) for name in ("img_size", "patch_size")}
    read["in_chans"] = getattr(getattr(embed, "proj", None), "in_channels", None)
    known = _arguments_of(model.pretrained_cfg["architecture"])
    return {name: value for name, value in read.items() if isinstance(value, (int, str, tuple)) and name in known}


def _made(model: nn.Module) -> dict[str, Any]:
    """Return all that tells how a model was made, but for dropout."""
    passing, plain = re.compile(r"_|training$|grad_checkpointing|fused_attn|drop"), (bool, int, float, str, tuple)
    made: dict[str, Any] = {key: value.shape for key, value in model.state_dict().items()}
    for path, module in model.named_modules():
        if type(module).__name__ not in ("Identity", "Dropout", "DropPath"):
            own = {key: v for key, v in vars(module).items() if isinstance(v, plain) and not passing.match(key)}
            made[f"{path}:"] = (type(module), own)
    return made


def without_weights(library: str) -> Any:
    """Return a context in which a library's models are made without memory for their weights."""
    if library == "timm" and TorchVersion(version("timm")) >= "1.0.21":
        return torch.device("meta")
    from accelerate import init_empty_weights  # which lets models compute settings with tensors

    return init_empty_weights()


def check_timm_model(name: str, arguments: Mapping[str, Any]) -> None:
    """Raise ModelError unless timm has registered the model and its classes have all of the arguments.

    So none names a file, a hub or code: `timm.create_model` would take `checkpoint_path` or `pretrained_cfg`.
    """
    import timm

    if not name.isidentifier() or not timm.is_model(name):
        raise ModelError(f"{name!r} is no model that timm has registered")
    known = _arguments_of(name)
    for argument in arguments:
        if argument not in known:
            raise ModelError(f"{argument!r} is no argument of the model {name}; leave it out")


def _arguments_of(name: str) -> set[str]:
    """Return the arguments of all classes beside the function that makes a model of timm."""
    import timm

    module = sys.modules[timm.model_entrypoint(name).__module__]
    classes = [item for item in vars(module).values() if isinstance(item, type) and issubclass(item, nn.Module)]
    return {key for item in classes for key in inspect.signature(item.__init__).parameters} - {"self", "args", "kwargs"}


def _of_transformers(model: Any) -> dict[str, Any] | None:
    """Return a model's class and settings as JSON values; None for one that cannot be made from these."""
    import transformers

    cls = type(model)
    if getattr(transformers, cls.__name__, None) is not cls or not issubclass(cls, transformers.PreTrainedModel):
        return None
    source = {
        "library": "transformers",
        "class": cls.__name__,
        "config": dict(sorted(model.config.to_diff_dict().items())),  # whose order depends on how it was made
        "attention": model.config._attn_implementation,
    }
    if _POOLING in inspect.signature(cls).parameters and getattr(model, "pooler", None) is None:
        source["pooling"] = False
    return source


def _by_transformers(source: dict[str, Any]) -> nn.Module:
    """Make a model of transformers. Raises ModelError when its settings ask for code."""
    cls, config = _class_named(source.get("class")), source["config"]
    named = (value for key, value in _settings(config) if "implementation" in key and not isinstance(value, bool))
    asked = {source["attention"], *map(str, named)}
    if not asked <= {"None", *_ATTENTION} or any(key == "auto_map" for key, _ in _settings(config)):
        raise ModelError(f"its configuration asks for code of others: {config.get('auto_map', sorted(asked))}")
    for key, value in _settings(config):  # what timm would make, or be told to read
        if (value and "backbone" in key) or (key == "model_type" and str(value).startswith("timm")):
            raise ModelError(f"its configuration asks for code of others: {key}={value!r}")
    settings = cls.config_class.from_dict(config, attn_implementation=source["attention"])
    return cast(nn.Module, cls(settings, **({} if source.get("pooling", True) else {_POOLING: False})))


def other_release(source: Mapping[str, Any]) -> str:
    """Return in words that a model is of another release of transformers than the one here; else nothing."""
    with suppress(KeyError, TypeError):
        wrote = source["config"]["transformers_version"]
        here = getattr(sys.modules.get("transformers"), "__version__", wrote)
        if here != wrote:
            return f" (written with transformers {wrote}, which may name layers otherwise than {here}, which is here)"
    return ""


def _class_named(name: Any) -> Any:
    """Return a class of models of images that is defined in transformers and holds no model of another library."""
    import transformers

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


LIBRARIES = {"timm": (_of_timm, _by_timm), "transformers": (_of_transformers, _by_transformers)}
"""How each library's models are described, and made again."""
