"""Save and load models: `model.safetensors` with the weights and `model.json` with all that is needed to rebuild.

`model.json` holds the host (library, name, arguments), the architecture when pruned, whether it is folded, the input
(size, mean, std, interpolation, crop), the class names and figures. Nothing in a folder is executed: no pickle is
written or read, and a description may name registered models and plain arguments only.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spvit.architecture import Architecture, architecture_from_dict
from spvit.errors import ArchitectureError, CheckpointError, ModelError
from spvit.hosts.recognise import family_of, family_of_library
from spvit.surgery import fold, prune, pruned_record

FORMAT = "spvit-model"
VERSION = 1
WEIGHTS = "model.safetensors"
DESCRIPTION = "model.json"
# The settings that published training scripts store beside the weights: plain containers, read so that the weights can
# be. The second is a dictionary of yacs, which need not be installed.
_SETTINGS: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
# Implementations of attention that come with transformers; it would download and run any other.
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# What timm would quietly resample to another input size.
_OF_INPUT_SIZE = ("patch_embed.proj.weight", "pos_embed", "relative_position_bias_table")


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for a model."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each channel, of values from 0 to 1."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, of values from 0 to 1."""
    interpolation: str = "bicubic"
    """How images are resized: `bicubic`, `bilinear` or `nearest`."""
    crop: float = 0.9
    """Share of the resized image's side that evaluation crops from its centre, above 0 and at most 1."""


@dataclass(frozen=True)
class Description:
    """What `model.json` says of a model."""

    host: dict[str, Any]
    """The dense model's library, name and arguments."""
    architecture: Architecture | None = None
    """What pruning kept; None for a dense model."""
    folded: bool = False
    input_size: tuple[int, int, int] | None = None
    """(channels, height, width) of the images that it takes."""
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] | None = None
    """Names of the classes, in the order of the logits."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Figures, such as the accuracy."""


def replace_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a file so that a kill leaves either the old or the new one: to a temporary name, then renamed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.touch()  # made by us, so that the file gets the user's own permissions whatever writes it
    mode = temporary.stat().st_mode
    write(temporary)
    temporary.chmod(mode)
    os.replace(temporary, path)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    replace_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's weights on the CPU: safetensors refuses tensors that share memory."""
    return {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}


def write_weights(model: nn.Module, path: str | Path) -> None:
    """Write a model's weights as a safetensors file, atomically; `read_weights` reads them."""
    state = plain_state(model)
    replace_atomically(path, lambda temporary: save_file(state, temporary, metadata={"format": "pt"}))


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] | None = None,
    metrics: Mapping[str, float] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a dense or pruned model to a folder, so that `load(folder)` rebuilds it. Returns the folder.

    Args:
        model: a host of a supported family, dense, pruned or folded.
        folder: made when absent.
        preprocessing: how images are prepared for it.
        classes: names of the classes, in the order of the logits.
        metrics: figures to keep beside it, such as its accuracy.
        overwrite: replace a model that the folder holds already.

    Raises:
        CheckpointError: the folder holds a model already, or `load` could not rebuild this one.
        UnsupportedHostError: the host cannot be rebuilt from a description.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).exists() and not overwrite:
        raise CheckpointError(f"{folder} holds a model already; name another folder, or pass overwrite=True")
    record, family = pruned_record(model), family_of(model)
    description = Description(
        host=family.source(model),
        architecture=record.architecture if record else None,
        folded=record.folded if record else False,
        input_size=family.input_size(model),
        preprocessing=preprocessing,
        classes=tuple(classes) if classes is not None else None,
        metrics=dict(metrics or {}),
    )
    with torch.device("meta"):
        own, rebuilt = model.state_dict(), _rebuilt(description).state_dict()
    key = _first_difference(own, rebuilt)
    if key is not None:
        raise CheckpointError(
            f"this model cannot be saved: its {key} is {_shape(own, key)}, but {_shape(rebuilt, key)} in what "
            "spvit.load would rebuild; its layers must be those of timm, transformers or spvit.prune (merge adapters "
            "first: model.merge_and_unload())"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(model, folder / WEIGHTS)
    write_text(folder / DESCRIPTION, _to_json(description))
    return folder


def describe(folder: str | Path) -> Description:
    """Return what a saved model is: its host, architecture, input size, preprocessing, class names and figures.

    Raises:
        CheckpointError: `model.json` is missing, damaged or of another version.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no spvit model: {DESCRIPTION} is missing")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT or data.pop("version", None) != VERSION:
        raise CheckpointError(
            f'{path} is not a model of this version, expected "format": "{FORMAT}", "version": {VERSION}'
        )
    known = [item.name for item in fields(Description)]
    unknown = next((name for name in data if name not in known), None)
    if unknown is not None:
        raise CheckpointError(f"{path}: unknown field {unknown!r}, expected {', '.join(known)}")
    try:
        description = Description(**{name: _read_field(name, value) for name, value in data.items()})
    except ArchitectureError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{path}: a field is missing or of the wrong kind ({error}); write it anew") from error
    if description.input_size is None:  # files of former versions do not say it
        with torch.device("meta"):
            host = _built(replace(description, architecture=None, folded=False), path)
        description = replace(description, input_size=family_of(host).input_size(host))
    return description


def _read_field(name: str, value: Any) -> Any:
    """Return a field of a description from what JSON has for it."""
    if value is None:
        return None
    if name == "architecture":
        return architecture_from_dict(value)
    if name == "preprocessing":
        return Preprocessing(**{**value, "mean": tuple(value["mean"]), "std": tuple(value["std"])})
    return tuple(value) if name in ("classes", "input_size") else value


def load(folder: str | Path) -> nn.Module:
    """Return the model that `save` wrote, in evaluation mode on the CPU.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not fit the description.
    """
    model = _built(describe(folder), Path(folder) / DESCRIPTION)
    state = read_weights(Path(folder) / WEIGHTS)
    dtype = next((value.dtype for value in state.values() if value.is_floating_point()), torch.float32)
    fit_state(model.to(dtype), state, str(Path(folder) / WEIGHTS))
    return model.eval()


def _built(description: Description, path: Path) -> nn.Module:
    try:
        return _rebuilt(description)
    except Exception as error:
        # Whatever a host's library raises for a name or an argument it does not know.
        raise CheckpointError(f"{path}: the model cannot be rebuilt: {error}") from error


def _rebuilt(description: Description) -> nn.Module:
    """Return a model as described, with random weights."""
    source = description.host
    family = family_of_library(source["library"], source.get("class"))
    if source["library"] == "timm":
        check_timm_model(source["name"], source["arguments"])
    else:
        _check_transformers_model(source)
    model = family.build(source)
    if description.architecture is not None:
        model = prune(model, description.architecture, inplace=True)
    return fold(model, inplace=True) if description.folded else model


def check_timm_model(name: str, arguments: Mapping[str, Any]) -> None:
    """Raise ModelError unless timm has registered the model and its classes have all of the arguments.

    So none names a file, a hub or code: `timm.create_model` would take `checkpoint_path` or `pretrained_cfg`.
    """
    import timm

    if not name.isidentifier() or not timm.is_model(name):
        raise ModelError(f"{name!r} is no model that timm has registered")
    module = sys.modules[timm.model_entrypoint(name).__module__]
    classes = [item for item in vars(module).values() if isinstance(item, type) and issubclass(item, nn.Module)]
    known = {parameter for item in classes for parameter in inspect.signature(item.__init__).parameters}
    unknown = next((argument for argument in arguments if argument not in known - {"self", "args", "kwargs"}), None)
    if unknown is not None:
        raise ModelError(f"{unknown!r} is no argument of the model {name}; leave it out")


def _check_transformers_model(source: Mapping[str, Any]) -> None:
    """Raise ModelError when a configuration asks for code that does not come with transformers."""
    config = source["config"]
    found = [source["attention"], *(value for key, value in config.items() if "implementation" in key)]
    if "auto_map" in config or not {*map(str, found)} <= {"None", *_ATTENTION}:
        raise ModelError(f"its configuration asks for code of others: {config.get('auto_map', found)}")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint file: `.safetensors`, or a `.pth` (read with `weights_only=True`).

    A `.pth` may keep the weights under `model` or `state_dict`, as the published DeiT files do; anything else in it
    (optimizer, settings, moving averages) is left out.

    Raises:
        CheckpointError: the file is missing, damaged, or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"checkpoint {path} is damaged or not a safetensors file: {error}") from error
    if path.suffix not in (".pth", ".pt", ".bin"):
        raise CheckpointError(
            f"checkpoint {path}: expected a .safetensors or .pth file, found {path.suffix or 'no ending'}"
        )
    try:
        with torch.serialization.safe_globals(_SETTINGS):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch.load raises whatever the damaged bytes lead to; all of it means the same to the user.
        raise CheckpointError(f"checkpoint {path} is damaged or not a weights file: {_unread(error)}") from error
    for name in ("model", "state_dict"):
        if isinstance(data, dict) and isinstance(data.get(name), dict):
            data = data[name]
    if not isinstance(data, dict) or not data or not all(isinstance(value, Tensor) for value in data.values()):
        found = f"the keys {', '.join(map(str, list(data)[:3]))}" if isinstance(data, dict) else type(data).__name__
        raise CheckpointError(f"checkpoint {path} holds no weights: expected a dictionary of tensors, found {found}")
    return data


def _unread(error: Exception) -> str:
    """Return in a line why torch.load did not read a file, without its advice to read it unsafely."""
    refused = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
    if refused:
        return f"it holds a {refused[1]}, which is not read since it could run code; save the weights alone"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def fit_state(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load weights into a model, all keys and shapes matching.

    Raises:
        CheckpointError: names the first key that differs and both shapes; the model is then unchanged.
    """
    own = model.state_dict()
    key = _first_difference(own, state)
    if key is not None:
        raise _unfitting(name, key, own, state)
    model.load_state_dict(dict(state))


def timm_state(host: nn.Module, state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return a checkpoint's weights under the keys of a timm host, as timm itself converts them.

    Args:
        host: the dense model; weights for a model of another library come back as they are.
        state: the checkpoint's weights.
        name: how messages call the checkpoint.

    Raises:
        CheckpointError: the weights are for images or windows of another size.
    """
    convert = getattr(importlib.import_module(type(host).__module__), "checkpoint_filter_fn", None)
    if convert is None:
        return dict(state)
    own = host.state_dict()
    other = {key for key, value in state.items() if key not in own or own[key].shape != value.shape}
    refused = next((key for key in state if key in other and key.endswith(_OF_INPUT_SIZE)), None)
    if refused is not None:
        raise _unfitting(name, next(key for key in own if key in other) if refused in own else refused, own, state)
    converted: dict[str, Tensor] = convert(dict(state), host)
    return converted


def _first_difference(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str | None:
    """Return the first key that only one has, or that has another shape in each."""
    keys = dict.fromkeys([*own, *other])
    return next((k for k in keys if k not in own or k not in other or own[k].shape != other[k].shape), None)


def _unfitting(name: str, key: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {name} does not fit: {key} is {_shape(state, key)} there, but {_shape(own, key)} in the model"
    )


def _shape(state: Mapping[str, Tensor], key: str) -> str:
    return str(list(state[key].shape)) if key in state else "missing"


def _to_json(description: Description) -> str:
    own = {name: value for name, value in asdict(replace(description, architecture=None)).items() if value is not None}
    text = json.dumps({"format": FORMAT, "version": VERSION, **own}, indent=2)
    if description.architecture is None:
        return text + "\n"
    return text[: text.rindex("\n}")] + ',\n  "architecture": ' + description.architecture.to_json().rstrip() + "\n}\n"
