"""Save and load models: `model.safetensors` with the weights and `model.json` with all that is needed to rebuild.

`model.json` holds the host (library, name, arguments), the architecture when pruned, whether it is folded, the input
(size, mean, std, interpolation, crop) and the class names. No pickle is written; none is read unless a `.pth` is named.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spvit.architecture import Architecture, architecture_from_dict
from spvit.errors import ArchitectureError, CheckpointError, UnsupportedHostError
from spvit.hosts.recognise import family_of, family_of_library
from spvit.surgery import fold, prune, pruned_record

FORMAT = "spvit-model"
VERSION = 1
WEIGHTS = "model.safetensors"
DESCRIPTION = "model.json"
# The settings that published training scripts store beside the weights: plain containers, read so that the weights can
# be. The second is a dictionary of yacs, which need not be installed.
_SETTINGS: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
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
    """What `model.json` says."""

    host: dict[str, Any]
    architecture: Architecture | None = None
    folded: bool = False
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] | None = None
    metrics: dict[str, float] = field(default_factory=dict)


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


def write_weights(model: nn.Module, path: str | Path) -> None:
    """Write a model's weights as a safetensors file, atomically; `read_weights` reads them."""
    # Cloned, since safetensors refuses tensors that share memory.
    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
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
        CheckpointError: the folder holds a model already.
        UnsupportedHostError: the host cannot be rebuilt from a description.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).exists() and not overwrite:
        raise CheckpointError(f"{folder} holds a model already; name another folder, or pass overwrite=True")
    record = pruned_record(model)
    description = Description(
        family_of(model).source(model),
        record.architecture if record else None,
        record.folded if record else False,
        preprocessing,
        tuple(classes) if classes is not None else None,
        dict(metrics or {}),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(model, folder / WEIGHTS)
    write_text(folder / DESCRIPTION, _to_json(description))
    return folder


def describe(folder: str | Path) -> Description:
    """Return what the `model.json` of a folder says. Raises CheckpointError naming the file."""
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no spvit model: {DESCRIPTION} is missing")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT or data.pop("version", None) != VERSION:
        raise CheckpointError(
            f'{path} is not a model of this version, expected "format": "{FORMAT}", "version": {VERSION}'
        )
    known = [item.name for item in fields(Description)]
    for name in data:
        if name not in known:
            raise CheckpointError(f"{path}: unknown field {name!r}, expected {', '.join(known)}")
    try:
        if data.get("architecture") is not None:
            data["architecture"] = architecture_from_dict(data["architecture"])
        if data.get("preprocessing") is not None:
            values = data["preprocessing"]
            mean, std = tuple(values.pop("mean")), tuple(values.pop("std"))
            data["preprocessing"] = Preprocessing(mean, std, **values)
        if data.get("classes") is not None:
            data["classes"] = tuple(data["classes"])
        return Description(**data)
    except ArchitectureError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{path}: a field is missing or of the wrong kind ({error}); write it anew") from error


def load(folder: str | Path) -> nn.Module:
    """Return the model that `save` wrote, in evaluation mode on the CPU.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not fit the description.
    """
    description = describe(folder)
    try:
        model = family_of_library(description.host["library"], description.host.get("class")).build(description.host)
        if description.architecture is not None:
            model = prune(model, description.architecture, inplace=True)
        if description.folded:
            model = fold(model, inplace=True)
    except (ArchitectureError, UnsupportedHostError, KeyError, RuntimeError, TypeError) as error:
        reason = f"field {error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{Path(folder) / DESCRIPTION}: the model cannot be rebuilt: {reason}") from error
    path = Path(folder) / WEIGHTS
    state = read_weights(path)
    dtype = next((value.dtype for value in state.values() if value.is_floating_point()), None)
    model = model.to(dtype)
    fit_state(model, state, str(path))
    return model.eval()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint file: `.safetensors`, or a `.pth` (read with `weights_only=True`).

    A `.pth` may keep the weights under `model` or `state_dict`, as the published DeiT files do; what stands beside
    them (optimizer, settings, moving averages) is left out.

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
    for key, value in own.items():
        if key not in state:
            raise CheckpointError(f"checkpoint {name} does not fit: the model's {key} {_shape(value)} is missing there")
        if state[key].shape != value.shape:
            raise CheckpointError(
                f"checkpoint {name} does not fit: {key} is {_shape(state[key])} there, but {_shape(value)} in the model"
            )
    extra = next((key for key in state if key not in own), None)
    if extra is not None:
        raise CheckpointError(
            f"checkpoint {name} does not fit: it has {extra} {_shape(state[extra])}, the model does not"
        )
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
        first = next(key for key in own if key in other) if refused in own else refused
        here = f"{_shape(own[first])} in the model" if first in own else "the model has none"
        raise CheckpointError(f"checkpoint {name} does not fit: {first} is {_shape(state[first])} there, but {here}")
    converted: dict[str, Tensor] = convert(dict(state), host)
    return converted


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _to_json(description: Description) -> str:
    data = {"format": FORMAT, "version": VERSION, "host": description.host, "folded": description.folded}
    if description.preprocessing is not None:
        data["preprocessing"] = asdict(description.preprocessing)
    if description.classes is not None:
        data["classes"] = list(description.classes)
    if description.metrics:
        data["metrics"] = description.metrics
    text = json.dumps(data, indent=2)
    if description.architecture is None:
        return text + "\n"
    return text[: text.rindex("\n}")] + ',\n  "architecture": ' + description.architecture.to_json().rstrip() + "\n}\n"
