"""A model from what a user names: of timm, of Hugging Face, what spvit wrote, here or on the hub, or a function."""

import difflib
import importlib
import re
import shlex
import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spvit import checkpoint
from spvit.checkpoint import Preprocessing
from spvit.errors import ModelError, UnsupportedHostError, ZooError, first_line
from spvit.hosts.recognise import family_of, known_family, said_size
from spvit.hub import HUB, downloaded, spare_retries

HUGGING_FACE = "hf:"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model to start from."""

    model: str
    """A timm model (deit_tiny_patch16_224), hf:NAME or hf:FOLDER for Hugging Face, a folder that spvit wrote, hub:NAME
    for one that spvit push uploaded, or a published model (spvit_deit_tiny_patch16_224). On the command line also
    MODULE:FUNCTION, which returns yours."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of timm.create_model, such as {"img_size": 96}, or of the function."""
    pretrained: bool = True
    """Whether a timm model starts from its pre-trained weights (downloaded on first use)."""
    checkpoint: str | None = None
    """Weights to start from in place of the pre-trained ones: a .safetensors or .pth file that fits the model."""


@dataclass(frozen=True)
class OpenedModel:
    """A model, how images are prepared for it, its class names if known, and whether its head has been trained."""

    model: nn.Module
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None
    trained: bool


def open_model(
    config: ModelConfig,
    classes: int | None = None,
    *,
    any_family: bool = False,
    weights: bool = True,
    code: bool = False,
) -> OpenedModel:
    """Return the model that a configuration names.

    A head of another size than `classes` is replaced by an untrained one, in timm and Hugging Face models; None keeps
    the head, or takes that of the checkpoint. `any_family` takes models that cannot be pruned, too; without `weights`
    no pre-trained ones are loaded, and the model is one to count and measure. With `code` a name may be
    MODULE:FUNCTION, which is imported from the current directory and called.

    Raises:
        ModelError: the name is unknown, its weights cannot be downloaded, or code fails or is not allowed.
        HubError: a model of the hub cannot be downloaded.
        CheckpointError: a folder or weights file is damaged or does not fit.
        UnsupportedHostError: the model's family is not supported.
    """
    if names_code(config.model):
        if not code:
            raise ModelError(f"{config.model} names code, which only --model on the command line may")
        opened = _open_own(config)
    else:
        opened = _open(config, classes, weights)
    if not any_family:
        family_of(opened.model)
    if config.checkpoint is None:
        return opened
    read, head = checkpoint.read_weights(config.checkpoint), _head_keys(opened.model)
    found = next((len(read[key]) for key in head if key in read), None)
    trained = found is None or found == number_of_classes(opened.model)
    if not trained and classes is None:
        opened, trained = _open(config, found, weights), True
    state = checkpoint.timm_state(opened.model, read, config.checkpoint, sized="img_size" in config.model_args)
    if not trained:
        own = opened.model.state_dict()
        state |= {key: own[key] for key in head}
    checkpoint.fit_state(opened.model, state, config.checkpoint)
    return replace(opened, trained=trained)


def device_named(name: str) -> torch.device:
    """Return a device of this machine: `cpu`, `cuda:1`, `mps`. Raises ModelError naming those that are there."""
    there = ["cpu"]
    if torch.accelerator.is_available() and (found := torch.accelerator.current_accelerator()) is not None:
        there += [found.type, *(f"{found.type}:{index}" for index in range(torch.accelerator.device_count()))]
    if name not in there:
        raise ModelError(f"device {name!r} cannot be used; there is {', '.join(there)}")
    return torch.device(name)


def names_code(model: str) -> bool:
    """Return whether a name of a model is MODULE:FUNCTION."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", model) is not None and not model.startswith(
        (HUGGING_FACE, HUB)
    )


def _open_own(config: ModelConfig) -> OpenedModel:
    """Return the model that a function of the user's returns, alone or with its Preprocessing."""
    module, _, name = config.model.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        make = getattr(importlib.import_module(module), name, None)
        made = make if isinstance(make, nn.Module) or make is None else make(**config.model_args)
    except Exception as error:  # whatever the user's code raises
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise ModelError(f"no module {module} is found from {Path.cwd()}; see {config.model}") from error
        raise ModelError(f"{config.model} failed: {type(error).__name__}: {first_line(error)}") from error
    model, preprocessing = made if isinstance(made, tuple) and len(made) == 2 else (made, Preprocessing())
    if make is None:
        raise ModelError(f"module {module} has no {name!r}; expected a function or class that returns the model")
    if not isinstance(model, nn.Module) or not isinstance(preprocessing, Preprocessing):
        raise ModelError(f"{config.model} returned {type(made).__name__}, expected a torch.nn.Module")
    return OpenedModel(model, _for_channels(preprocessing, input_of(model)[0]), None, trained=True)


def _for_channels(preprocessing: Preprocessing, channels: int) -> Preprocessing:
    """Return the preprocessing of so many channels: where it is of others, their mean for each."""
    if len(preprocessing.mean) == channels:
        return preprocessing
    mean, std = ((sum(values) / len(values),) * channels for values in (preprocessing.mean, preprocessing.std))
    return replace(preprocessing, mean=mean, std=std)


def _open(config: ModelConfig, classes: int | None, weights: bool) -> OpenedModel:
    """Return the model without the weights of `checkpoint`."""
    ours = config.model.startswith(HUB) or (Path(config.model) / checkpoint.DESCRIPTION).is_file()
    hugging_face = config.model.startswith(HUGGING_FACE)
    if config.model_args and (ours or hugging_face):
        raise ModelError(f"model_args go with timm models only; {config.model} brings its own")
    if hugging_face:
        return _open_hugging_face(config.model.removeprefix(HUGGING_FACE), classes, weights)
    if not ours:
        return _open_timm(config, classes, weights)
    folder = downloaded(config.model, checkpoint.DESCRIPTION, checkpoint.WEIGHTS)
    model, found = checkpoint.load(folder), checkpoint.describe(folder)
    return OpenedModel(model, found.preprocessing or Preprocessing(), found.classes, trained=True)


def _open_timm(config: ModelConfig, classes: int | None, weights: bool) -> OpenedModel:
    import timm
    from timm.data import resolve_data_config

    from spvit.hosts.rebuild import check_timm_model, make_by_timm
    from spvit.zoo import architectures, host_name  # with it timm knows the published models

    name = config.model.split(".")[0]
    if not timm.is_model(name):
        _check_no_run(Path(config.model))
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.7)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        known = "a timm model nor a folder that spvit wrote, and does not start with hf: or hub:"
        raise ModelError(f"model {config.model!r} is neither {known}{hint}")
    check_timm_model(host_name(name) if name in architectures() else name, config.model_args)
    arguments = {**({} if classes is None else {"num_classes": classes}), **config.model_args}
    pretrained = config.pretrained and config.checkpoint is None
    if pretrained and weights:
        spare_retries()
    try:
        model: Any = make_by_timm(config.model, pretrained=pretrained and weights, **arguments)
    except ZooError:
        raise
    except (OSError, RuntimeError) as error:
        raise _not_downloaded(config.model, "timm", error) from error
    except (AssertionError, TypeError, ValueError) as error:
        raise ModelError(f"model_args do not fit {config.model}: {error}") from error
    data = resolve_data_config({}, model=model)
    preprocessing = Preprocessing(tuple(data["mean"]), tuple(data["std"]), data["interpolation"], data["crop_pct"])
    own_head = model.num_classes == model.pretrained_cfg.get("num_classes")
    return OpenedModel(model, _for_channels(preprocessing, input_of(model)[0]), None, trained=pretrained and own_head)


def _check_no_run(folder: Path) -> None:
    """Raise ModelError when a folder without a model is of a run: of a frontier, or of one that was cut short."""
    settings = folder / "config.yaml"
    if not settings.is_file():
        return
    with settings.open(encoding="utf-8", errors="replace") as file:
        command = file.readline().strip().removeprefix("# ")
    if not command.startswith("spvit "):
        return
    found = sorted(path.parent for path in folder.glob(f"*/{checkpoint.DESCRIPTION}") if path.parent.name != "dense")
    if command == "spvit frontier" and found:
        raise ModelError(f"{folder} holds a model for each budget; name one of {', '.join(map(str, found))}")
    advice = f"continue it with: {command} --output {shlex.quote(str(folder))} --resume"
    raise ModelError(f"the run in {folder} has written no model yet; {advice}")


def _open_hugging_face(name: str, classes: int | None, weights: bool) -> OpenedModel:
    try:
        from transformers import AutoConfig, AutoImageProcessor
        from transformers.utils import logging
    except ImportError as error:
        raise ModelError("Hugging Face models need an extra; install it with: pip install 'spvit[hf]'") from error
    spare_retries()
    logging.disable_progress_bar()
    safely = {"trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(name, **safely)
        auto, headed, saved = _auto_class(config, classes is not None)
        names = tuple(config.id2label[index] for index in range(config.num_labels)) if headed else None
        resized = headed and classes not in (None, config.num_labels)
        if resized:
            config.num_labels = classes
        if weights:
            model = auto.from_pretrained(name, config=config, ignore_mismatched_sizes=resized, **safely)
        else:
            model = auto.from_config(config, **safely)
    except (OSError, ValueError) as error:
        raise _not_downloaded(name, "Hugging Face", error) from error
    try:
        processor = AutoImageProcessor.from_pretrained(name, use_fast=False, trust_remote_code=False)
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    except (OSError, ValueError, AttributeError):  # a folder without one: Hugging Face's own default for ViT
        mean = std = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing(mean, std, "bilinear", crop=1.0)
    tower = model if headed else getattr(model, "vision_model", model)  # of images and text
    return OpenedModel(tower, preprocessing, None if resized else names, trained=not resized and (saved or not headed))


def _auto_class(config: Any, wants_classes: bool) -> tuple[Any, bool, bool]:
    """Return the class that opens a model of Hugging Face, whether that has a head, and whether the head was saved.

    One that was saved without a head gets one where classes are wanted and transformers knows such a model.
    """
    from transformers import AutoModel, AutoModelForImageClassification

    known = type(config) in AutoModelForImageClassification._model_mapping
    saved = any("ImageClassification" in name for name in config.architectures or ["ImageClassification"])
    headed = known and (saved or wants_classes)
    return (AutoModelForImageClassification if headed else AutoModel), headed, saved


def _not_downloaded(name: str, library: str, error: Exception) -> ModelError:
    return ModelError(
        f"could not download the weights of {name} from {library} ({first_line(error)}); without a "
        "connection, name a folder, or a weights file with --checkpoint if it is the model to compress"
    )


# What models of any kind say of themselves, of supported families or not; libraries spell it differently.


def number_of_classes(model: nn.Module) -> int:
    """Return how many classes a model's head has. Raises UnsupportedHostError when it has none."""
    count = getattr(model, "num_classes", None) or getattr(model, "num_labels", None)
    if not isinstance(count, int):
        count = 0
        with suppress(UnsupportedHostError):
            count = family_of(model).classes(model)
    if count < 1:
        raise UnsupportedHostError(f"this {type(model).__name__} has no classification head; make it with num_classes")
    return count


def _head_keys(model: nn.Module) -> list[str]:
    """Return the keys of the parameters of a model's classification heads; none where the library names no head."""
    heads: Any = getattr(model, "get_classifier", lambda: getattr(model, "classifier", None))()
    members = {id(head) for head in (heads if isinstance(heads, tuple) else (heads,))}
    named = [(name, module) for name, module in model.named_modules() if id(module) in members]
    return [f"{name}.{key}" for name, module in named for key in module.state_dict()]


def input_of(model: Any) -> tuple[int, tuple[int, int] | None]:
    """Return how many channels a model takes, and the (height, width) that it needs; None for any."""
    family = None
    with suppress(UnsupportedHostError):
        family = known_family(model)
    if family is not None:
        channels, *size = family.input_size(model)
        return channels, (size[0], size[1])
    source = getattr(model, "pretrained_cfg", None)
    channels, said = said_size(model)
    # Images for models of Hugging Face are resized to what they were trained on.
    return channels, None if source and not source.get("fixed_input_size") else said


def undecayed(model: nn.Module) -> set[str]:
    """Return patterns of the parameters that take no weight decay: biases by token, and position and class tokens."""
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    return {f"*{name}" for name in (*exempt, "cls_token", "mask_token", "position_embeddings")}
