"""A model from what a user names: a timm model, a Hugging Face model, or a folder that spvit wrote."""

import difflib
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

from torch import nn

from spvit.checkpoint import (
    DESCRIPTION,
    Preprocessing,
    check_timm_model,
    describe,
    fit_state,
    load,
    read_weights,
    timm_state,
)
from spvit.errors import ModelError, UnsupportedHostError, ZooError
from spvit.hosts.host import input_size
from spvit.hosts.recognise import family_of

HUGGING_FACE = "hf:"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model to start from."""

    model: str
    """A timm model (deit_tiny_patch16_224), hf:NAME or hf:FOLDER for Hugging Face, a folder that spvit wrote, or a
    published model (spvit_deit_tiny_patch16_224)."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of timm.create_model, such as {"img_size": 96}."""
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
    config: ModelConfig, classes: int | None = None, *, any_family: bool = False, weights: bool = True
) -> OpenedModel:
    """Return the model that a configuration names.

    Args:
        config: which model.
        classes: how many classes its head must have; a head of another size is replaced by an untrained one, in timm
            and Hugging Face models. None keeps the head, or takes that of the checkpoint.
        any_family: take models of families that cannot be pruned, too.
        weights: whether to load pre-trained weights; without them the model is one to count and measure.

    Raises:
        ModelError: the name is unknown, or its weights cannot be downloaded.
        CheckpointError: a folder or weights file is damaged or does not fit.
        UnsupportedHostError: the model's family is not supported.
    """
    if config.checkpoint is None:
        return _open(config, classes, any_family, weights)
    read, opened = read_weights(config.checkpoint), _open(config, classes, any_family, weights)
    head = _head_keys(opened.model)
    found = next((len(read[key]) for key in head if key in read), None)
    trained = found is None or found == number_of_classes(opened.model)
    if not trained and classes is None:
        opened, trained = _open(config, found, any_family, weights), True
    state = timm_state(opened.model, read, config.checkpoint)
    if not trained:
        own = opened.model.state_dict()
        state |= {key: own[key] for key in head}
    fit_state(opened.model, state, config.checkpoint)
    return replace(opened, trained=trained)


def _open(config: ModelConfig, classes: int | None, any_family: bool, weights: bool) -> OpenedModel:
    """Return the model without the weights of `checkpoint`."""
    folder, hugging_face = (Path(config.model) / DESCRIPTION).is_file(), config.model.startswith(HUGGING_FACE)
    if config.model_args and (folder or hugging_face):
        raise ModelError(f"model_args go with timm models only; {config.model} brings its own")
    if folder:
        found = describe(config.model)
        opened = OpenedModel(load(config.model), found.preprocessing or Preprocessing(), found.classes, trained=True)
    elif hugging_face:
        opened = _open_hugging_face(config.model.removeprefix(HUGGING_FACE), classes, weights)
    else:
        opened = _open_timm(config, classes, any_family, weights)
    if not any_family:
        family_of(opened.model)
    return opened


def _open_timm(config: ModelConfig, classes: int | None, any_family: bool, weights: bool) -> OpenedModel:
    import timm
    from timm.data import resolve_data_config

    from spvit.zoo import architectures, host_name  # with it timm knows the published models

    name = config.model.split(".")[0]
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.7)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ModelError(
            f"model {config.model!r} is neither a timm model nor a folder that spvit wrote, and does not start with "
            f"hf:{hint}"
        )
    check_timm_model(host_name(name) if name in architectures() else name, config.model_args)
    arguments = {**({} if classes is None else {"num_classes": classes}), **config.model_args}
    pretrained = config.pretrained and config.checkpoint is None
    if pretrained and weights:
        _spare_retries()
    try:
        model = timm.create_model(config.model, pretrained=pretrained and weights, **arguments)
    except ZooError:
        raise
    except (OSError, RuntimeError) as error:
        raise _not_downloaded(config.model, "timm", error) from error
    except (AssertionError, TypeError, ValueError) as error:
        raise ModelError(f"model_args do not fit {config.model}: {error}") from error
    data = resolve_data_config({}, model=model)
    channels = len(data["mean"]) if any_family else input_size(model)[0]
    mean, std = (_by_channel(data[key], channels) for key in ("mean", "std"))
    own_head = model.num_classes == model.pretrained_cfg.get("num_classes")
    preprocessing = Preprocessing(mean, std, data["interpolation"], data["crop_pct"])
    return OpenedModel(model, preprocessing, None, trained=pretrained and own_head)


def _by_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Return a value a channel; for another number of channels than the model's source had, their mean."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def _open_hugging_face(name: str, classes: int | None, weights: bool) -> OpenedModel:
    try:
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
        from transformers.utils import logging
    except ImportError as error:
        raise ModelError("Hugging Face models need an extra; install it with: pip install 'spvit[hf]'") from error
    _spare_retries()
    logging.disable_progress_bar()
    safely = {"trust_remote_code": False}
    try:
        own = AutoConfig.from_pretrained(name, **safely)
        resized = classes is not None and classes != own.num_labels
        head = {"num_labels": classes} if resized else {}
        if weights:
            model = AutoModelForImageClassification.from_pretrained(
                name, ignore_mismatched_sizes=resized, **head, **safely
            )
        else:
            config = AutoConfig.from_pretrained(name, **head, **safely)
            model = AutoModelForImageClassification.from_config(config, **safely)
    except (OSError, ValueError) as error:
        raise _not_downloaded(name, "Hugging Face", error) from error
    try:
        processor = AutoImageProcessor.from_pretrained(name, use_fast=False, **safely)
        preprocessing = Preprocessing(tuple(processor.image_mean), tuple(processor.image_std), "bilinear", 1.0)
    except (OSError, ValueError, AttributeError):
        # A folder without an image processor: Hugging Face's own default for ViT.
        preprocessing = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 1.0)
    names = None if resized else tuple(own.id2label[i] for i in range(own.num_labels))
    return OpenedModel(model, preprocessing, names, trained=not resized)


def _spare_retries() -> None:
    """Tell the hub client at once when its server cannot be reached, in place of a minute of attempts.

    Weights in the local cache are found all the same.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    if getproxies():
        return
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def _not_downloaded(name: str, library: str, error: Exception) -> ModelError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ModelError(
        f"could not download the weights of {name} from {library} ({reason}); without a connection, name a folder, or "
        "a weights file with --checkpoint if it is the model to compress"
    )


# What models of any kind say of themselves, of supported families or not; libraries spell it differently.


def number_of_classes(model: nn.Module) -> int:
    """Return how many classes a model's head has. Raises UnsupportedHostError when it has none."""
    count = getattr(model, "num_classes", None) or getattr(model, "num_labels", None)
    if not isinstance(count, int) or count < 1:
        raise UnsupportedHostError(
            f"this {type(model).__name__} has no classification head; make it with num_classes=..."
        )
    return count


def _head_keys(model: nn.Module) -> list[str]:
    """Return the keys of the parameters of a model's classification heads; none where the library names no head."""
    of_timm: Any = getattr(model, "get_classifier", None)
    heads = of_timm() if of_timm is not None else getattr(model, "classifier", None)
    members = heads if isinstance(heads, tuple) else (heads,)
    names = [name for name, module in model.named_modules() if any(module is member for member in members)]
    return [f"{name}.{key}" for name in names for key in model.get_submodule(name).state_dict()]


def input_of(model: Any) -> tuple[int, tuple[int, int] | None]:
    """Return how many channels a model takes, and the (height, width) that it needs; None for any."""
    try:
        channels, *size = input_size(model)
    except UnsupportedHostError:
        source = getattr(model, "pretrained_cfg", None)
        if source is None:  # of Hugging Face: images are resized to what it was trained on
            side: Any = getattr(model.config, "image_size", None)
            channels = getattr(model.config, "num_channels", 3)
            size = [] if side is None else [side, side] if isinstance(side, int) else list(side)
        else:
            channels, *size = source["input_size"]
            size = size if source.get("fixed_input_size") else []
    return channels, (size[0], size[1]) if size else None


def undecayed(model: nn.Module) -> set[str]:
    """Return patterns of the parameters that take no weight decay: biases by token, and position and class tokens."""
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    tokens = ("cls_token", "mask_token", "position_embeddings")
    return {f"*{name}" for name in exempt} | {f"*{name}" for name in tokens}
