"""Save and load models: `model.safetensors` with the weights and `model.json` with all that is needed to rebuild.

Nothing in a folder is executed: no pickle is written or read, and a description may name registered models and plain
arguments only.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import logging
import os
import re
import stat
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spvit.architecture import Architecture, architecture_from_dict
from spvit.errors import ArchitectureError, CheckpointError, not_written, why_unread
from spvit.fields import fields_of, from_data, to_data
from spvit.hosts.family import Family
from spvit.hosts.host import Host
from spvit.hosts.rebuild import blank, build, can_build, other_release, source_of, without_weights
from spvit.hosts.recognise import family_of
from spvit.hub import downloaded
from spvit.surgery import cut, fold, pruned_record

FORMAT = "spvit-model"
VERSION = 1
WEIGHTS = "model.safetensors"
DESCRIPTION = "model.json"
UNFINISHED = ".tmp"
"""Ending of a file that is being written, whose name starts with a dot."""
# The settings that published training scripts store beside the weights: plain containers, read so that the weights can
# be. The second is a dictionary of yacs, which need not be installed.
_SETTINGS: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
# What timm would quietly resample to another input size.
_OF_INPUT_SIZE = ("patch_embed.proj.weight", "pos_embed", "relative_position_bias_table")

logger = logging.getLogger("spvit")


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for a model; `mean` and `std` are of each channel, of values from 0 to 1."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    """How images are resized: `bicubic`, `bilinear` or `nearest`."""
    crop: float = 0.9
    """Share of the resized image's side that evaluation crops from its centre, above 0 and at most 1."""

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise CheckpointError(f"preprocessing has {len(self.mean)} values of mean and {len(self.std)} of std")


@dataclass(frozen=True)
class Description:
    """What `model.json` says of a model."""

    host: dict[str, Any]
    """The dense model's library, name and arguments, and where its layers were found."""
    input_size: tuple[int, int, int]
    """(channels, height, width) of the images that it takes."""
    architecture: Architecture | None = None
    """What pruning kept; None for a dense model."""
    folded: bool = False
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] | None = None
    """Names of the classes, in the order of the logits."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Figures, such as the accuracy."""


def replace_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a file so that a kill or a crash leaves either the old or the new one: to a temporary name, then renamed.

    It gets the permissions of its folder, so that whoever shares the folder shares the file. Raises RunError when it
    cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        temporary.touch()  # made by us, so that the file gets the user's own permissions whatever writes it
        mode = temporary.stat().st_mode
        write(temporary)
        folder = path.parent.stat().st_mode
        temporary.chmod(mode if folder & stat.S_ISVTX else folder & 0o664)  # all users share a sticky folder
        _to_disk(temporary)
        os.replace(temporary, path)
        with suppress(OSError):  # not every file system has this for folders
            _to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise not_written(path, error) from error


def _to_disk(path: Path) -> None:
    """Wait until what was written is on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def make_folder(path: Path) -> None:
    """Make a folder with the permissions of the one that it is in. Does nothing when it is there."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        parent = path.parent.stat().st_mode
        if not parent & stat.S_ISVTX:
            path.chmod(stat.S_IMODE(parent))


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    replace_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's weights on the CPU: safetensors refuses tensors that share memory."""
    return {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}


def write_weights(model: nn.Module, path: str | Path) -> None:
    """Write a model's weights as a safetensors file, atomically; `read_weights` reads them."""
    replace_atomically(path, lambda temporary: save_file(plain_state(model), temporary, metadata={"format": "pt"}))


def save(
    model: nn.Module | Host,
    folder: str | Path,
    *,
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] | None = None,
    metrics: Mapping[str, float] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a dense, pruned or folded model to a folder, so that `load(folder)` rebuilds it. Returns the folder.

    A model that neither timm nor transformers makes loads onto a dense one: `load(folder, host=model)`. Beside the
    weights go what images need (preprocessing, names of the classes in the order of the logits) and figures such as the
    accuracy. The folder is made when absent; `overwrite` replaces a model that it holds already.

    Raises:
        CheckpointError: the folder holds a model already, or `load` could not rebuild this one.
        UnsupportedHostError: the model is no host.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).exists() and not overwrite:
        raise CheckpointError(f"{folder} holds a model already; name another folder, or pass overwrite=True")
    family = model.family if isinstance(model, Host) else family_of(model)
    model = model.model if isinstance(model, Host) else model
    record = pruned_record(model)
    if classes is not None and len(classes) != family.classes(model):
        raise CheckpointError(f"{len(classes)} class names were given for a model of {family.classes(model)} classes")
    description = Description(
        host=source_of(model) | ({"family": to_data(family)} if type(family) is Family else {}),
        architecture=record.architecture if record else None,
        folded=record is not None and record.folded,
        input_size=family.input_size(model),
        preprocessing=preprocessing,
        classes=tuple(classes) if classes is not None else None,
        metrics=dict(metrics or {}),
    )
    different = None
    if can_build(description.host):
        with without_weights(description.host["library"]):
            different = _difference(
                model.state_dict(), _built(description, folder / DESCRIPTION, make=blank).state_dict()
            )
    if different is not None:
        key, own, rebuilt = different
        found = f"its {key} is {own}, but {rebuilt} in what spvit.load would rebuild"
        allowed = "layers must be those of timm, transformers or spvit.prune (merge adapters: model.merge_and_unload())"
        raise CheckpointError(f"this model cannot be saved: {found}; its {allowed}")
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(model, folder / WEIGHTS)
    write_text(folder / DESCRIPTION, _to_json(description))
    return folder


def describe(folder: str | Path) -> Description:
    """Return what a saved model is: its host, architecture, input size, preprocessing, class names and figures.

    Raises:
        CheckpointError: `model.json` is missing, damaged or of another version.
        HubError: `hub:NAME` cannot be downloaded.
    """
    path = downloaded(folder, DESCRIPTION) / DESCRIPTION
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no spvit model: {DESCRIPTION} is missing")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    try:
        values = fields_of(data, FORMAT, VERSION)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not a model of this version, {error}") from error
    try:
        kept = values.pop("architecture", None)
        description: Description = from_data(Description, values, "model")
        return replace(description, architecture=None if kept is None else architecture_from_dict(kept))
    except (ArchitectureError, CheckpointError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _to_json(description: Description) -> str:
    own = {name: value for name, value in asdict(replace(description, architecture=None)).items() if value is not None}
    text = json.dumps({"format": FORMAT, "version": VERSION, **own}, indent=2)
    # Lists of numbers take one line: the tokens of windows are thousands.
    text = re.sub(r"\[\n\s+([-+.e\d\s,]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    if description.architecture is None:
        return text + "\n"
    return text[: text.rindex("\n}")] + ',\n  "architecture": ' + description.architecture.to_json().rstrip() + "\n}\n"


def load(folder: str | Path, *, host: nn.Module | None = None) -> nn.Module:
    """Return the model that `save` wrote, in evaluation mode on the CPU.

    Args:
        folder: what `save` wrote, or `hub:NAME` for what `push` uploaded (`hub:NAME@REVISION` for one version of it).
        host: the dense model, with any weights, of a saved model that neither timm nor transformers makes. It stays as
            it is.

    Raises:
        CheckpointError: a file is missing or damaged, the weights do not fit the description, or the host does not
            fit, or is missing.
        HubError: `hub:NAME` cannot be downloaded.
    """
    folder = downloaded(folder, DESCRIPTION, WEIGHTS)
    description, state = describe(folder), read_weights(folder / WEIGHTS)
    model = _built(description, folder / DESCRIPTION, host, state)
    dtype = next((value.dtype for value in state.values() if value.is_floating_point()), torch.float32)
    fit_state(model.to(dtype), state, f"{folder / WEIGHTS}{other_release(description.host)}")
    return model.eval()


def _built(
    description: Description,
    path: Path,
    given: nn.Module | None = None,
    state: Mapping[str, Tensor] | None = None,
    make: Callable[[dict[str, Any]], nn.Module] = build,
) -> nn.Module:
    """Return a model as a file describes it, with random weights; made of a dense model where one is given."""
    try:
        host = described_host(description, given, make)
        if given is not None:
            _check_frame(host, state or {})
        if description.architecture is not None:
            with ExitStack() as undo:
                cut([host], host, [description.architecture], undo, fitted=True)
                undo.pop_all()
        return fold(host.model, inplace=True) if description.folded else host.model
    except Exception as error:  # whatever a host's library raises for a name or an argument it does not know
        said = f"{error}{other_release(description.host)}"
        raise CheckpointError(f"{path}: the model cannot be rebuilt: {said}") from error


def described_host(
    description: Description, given: nn.Module | None = None, make: Callable[[dict[str, Any]], nn.Module] = build
) -> Host:
    """Return the dense host that a file describes, with random weights, or a copy of one that is given."""
    source = description.host
    model = make(source) if given is None else copy.deepcopy(given).cpu()
    if "family" not in source:  # known by its class
        return Host.of(model)
    return Host(model, from_data(Family, source["family"], "host.family"))


def _check_frame(host: Host, state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless a dense model has all weights of a file that pruning leaves as they are."""
    changed = []
    for block in host.blocks:
        changed += [block.attention.path, block.attention.norm, *block.ffn.linears, block.ffn.second, block.ffn.norm]
    paths = tuple(path for path in changed if path is not None)

    def kept(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inside = tuple(f"{path}." for path in paths)
        return {key: value for key, value in weights.items() if not key.startswith(inside)}

    different = _difference(kept(host.model.state_dict()), kept(state))
    if different is not None:
        key, own, found = different
        raise CheckpointError(f"host= does not fit: {key} is {own} there, but {found} in the file")
    for path in paths:
        try:
            host.model.get_submodule(path)
        except AttributeError as error:
            raise CheckpointError(f"host= does not fit: it has no {path}") from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint file: `.safetensors`, or a `.pth` (read with `weights_only=True`).

    A `.pth` may keep the weights under `model` or `state_dict`, as the published DeiT files do; the rest is left out.
    Raises CheckpointError when the file is missing, damaged, or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    if path.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        found = path.suffix or "no ending"
        raise CheckpointError(f"checkpoint {path}: expected a .safetensors or .pth file, found {found}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_SETTINGS):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the damaged bytes lead to; all of it means the same to the user
        kind, reason = "safetensors" if path.suffix == ".safetensors" else "weights", why_unread(path, error)
        raise CheckpointError(f"checkpoint {path} is damaged or not a {kind} file: {reason}") from error
    for name in ("model", "state_dict"):
        if isinstance(data, dict) and isinstance(data.get(name), dict):
            data = data[name]
    if not isinstance(data, dict) or not data or not all(isinstance(value, Tensor) for value in data.values()):
        found = f"the keys {', '.join(map(str, list(data)[:3]))}" if isinstance(data, dict) else type(data).__name__
        raise CheckpointError(f"checkpoint {path} holds no weights: expected a dictionary of tensors, found {found}")
    return data


def fit_state(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load weights into a model. Raises CheckpointError, and changes nothing, unless all keys and shapes match."""
    _check_fit(model.state_dict(), state, name)
    model.load_state_dict(dict(state))


def timm_state(host: nn.Module, state: Mapping[str, Tensor], name: str, sized: bool | None = None) -> dict[str, Tensor]:
    """Return a checkpoint's weights under the keys of a timm host, as timm itself converts them.

    Weights for a model of another library come back as they are. Raises CheckpointError when they are for images or
    windows of another size, unless these are resampled: `sized` says if the user named a size; None: nobody may.
    """
    convert = getattr(importlib.import_module(type(host).__module__), "checkpoint_filter_fn", None)
    if convert is None:
        return dict(state)
    own = host.state_dict()
    sizes = {key: value for key, value in state.items() if key.endswith(_OF_INPUT_SIZE)}
    different = _difference({key: own[key] for key in sizes if key in own}, sizes)
    if different is not None and sized and different[0] in own:
        logger.warning("checkpoint %s: %s is %s there and resampled to %s", name, *different[::2], different[1])
    elif different is not None:
        both = {key: value for key, value in state.items() if key in own or key in sizes}
        same = (key in own and (key in sizes or "head" in key or own[key].shape == both[key].shape) for key in both)
        advice = "; --model-args '{\"img_size\": N}' resamples it" if sized is False and all(same) else ""
        _check_fit({key: value for key, value in own.items() if key in both}, both, name, advice)
    converted: dict[str, Tensor] = convert(dict(state), host)
    return converted


def _check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str, advice: str = "") -> None:
    different = _difference(own, state)
    if different is not None:
        problem = "{0} is {2} there, but {1} in the model".format(*different)
        raise CheckpointError(f"checkpoint {name} does not fit: {problem}{advice}")


def _difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> tuple[str, str, str] | None:
    """Return the first key that only one has or whose shapes differ, and in words its shape in each; or None."""
    for key in dict.fromkeys([*one, *other]):
        first, second = (str(list(state[key].shape)) if key in state else "missing" for state in (one, other))
        if first != second:
            return key, first, second
    return None
