"""A model from what a user names: a timm model, a Hugging Face model, or a folder that spvit wrote."""

import difflib
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

from torch import nn

from spvit import checkpoint
from spvit.checkpoint import Preprocessing
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

    A head of another size than `classes` is replaced by an untrained one, in timm and Hugging Face models; None keeps
    the head, or takes that of the checkpoint. `any_family` takes models that cannot be pruned, too; without `weights`
    no pre-trained ones are loaded, and the model is one to count and measure.

    Raises:
        ModelError: the name is unknown, or its weights cannot be downloaded.
        CheckpointError: a folder or weights file is damaged or does not fit.
        UnsupportedHostError: the model's family is not supported.
    """
    opened = _open(config, classes, weights)
    if not any_family:
        family_of(opened.model)
    if config.checkpoint is None:
        return opened
    read, head = checkpoint.read_weights(config.checkpoint), _head_keys(opened.model)
    found = next((len(read[key]) for key in head if key in read), None)
    trained = found in (None, number_of_classes(opened.model))
    if not trained and classes is None:
        opened, trained = _open(config, found, weights), True
    state = checkpoint.timm_state(opened.model, read, config.checkpoint)
    if not trained:
        own = opened.model.state_dict()
        state |= {key: own[key] for key in head}
    checkpoint.fit_state(opened.model, state, config.checkpoint)
    return replace(opened, trained=trained)


def _open(config: ModelConfig, classes: int | None, weights: bool) -> OpenedModel:
    """Return the model without the weights of `checkpoint`."""
    ours, hugging_face = (Path(config.model) / checkpoint.DESCRIPTION).is_file(), config.model.startswith(HUGGING_FACE)
    if config.model_args and (ours or hugging_face):
        raise ModelError(f"model_args go with timm models only; {config.model} brings its own")
    if hugging_face:
        return _open_hugging_face(config.model.removeprefix(HUGGING_FACE), classes, weights)
    if not ours:
        return _open_timm(config, classes, weights)
    model, found = checkpoint.load(config.model), checkpoint.describe(config.model)
    return OpenedModel(model, found.preprocessing or Preprocessing(), found.classes, trained=True)


def _open_timm(config: ModelConfig, classes: int | None, weights: bool) -> OpenedModel:
    import timm
    from timm.data import resolve_data_config

    from spvit.hosts.timm_models import check_timm_model
    from spvit.zoo import architectures, host_name  # with it timm knows the published models

    name = config.model.split(".")[0]
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.7)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        known = "a timm model nor a folder that spvit wrote, and does not start with hf:"
        raise ModelError(f"model {config.model!r} is neither {known}{hint}")
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
    data, (channels, _) = resolve_data_config({}, model=model), input_of(model)
    mean, std = tuple(data["mean"]), tuple(data["std"])
    if len(mean) != channels:  # than the model's source had: their mean for each
        mean, std = ((sum(values) / len(values),) * channels for values in (mean, std))
    own_head = model.num_classes == model.pretrained_cfg.get("num_classes")
    preprocessing = Preprocessing(mean, std, data["interpolation"], data["crop_pct"])
    return OpenedModel(model, preprocessing, None, trained=pretrained and own_head)


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
        config = AutoConfig.from_pretrained(name, **safely)
        names = tuple(config.id2label[index] for index in range(config.num_labels))
        resized = classes not in (None, config.num_labels)
        if resized:
            config.num_labels = classes
        if weights:
            safely |= {"config": config, "ignore_mismatched_sizes": resized}
            model = AutoModelForImageClassification.from_pretrained(name, **safely)
        else:
            model = AutoModelForImageClassification.from_config(config, **safely)
    except (OSError, ValueError) as error:
        raise _not_downloaded(name, "Hugging Face", error) from error
    try:
        processor = AutoImageProcessor.from_pretrained(name, use_fast=False, trust_remote_code=False)
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    except (OSError, ValueError, AttributeError):  # a folder without one: Hugging Face's own default for ViT
        mean = std = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing(mean, std, "bilinear", crop=1.0)
    return OpenedModel(model, preprocessing, None if resized else names, trained=not resized)


def _spare_retries() -> None:
    """Tell the hub client that its server cannot be reached, which it would try for a minute; the cache serves on."""
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    if not getproxies():
        try:
            socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
        except OSError:
            constants.HF_HUB_OFFLINE = True


def _not_downloaded(name: str, library: str, error: Exception) -> ModelError:
    return ModelError(
        f"could not download the weights of {name} from {library} ({checkpoint.first_line(error)}); without a "
        "connection, name a folder, or a weights file with --checkpoint if it is the model to compress"
    )


# What models of any kind say of themselves, of supported families or not; libraries spell it differently.


def number_of_classes(model: nn.Module) -> int:
    """Return how many classes a model's head has. Raises UnsupportedHostError when it has none."""
    count = getattr(model, "num_classes", None) or getattr(model, "num_labels", None)
    if not isinstance(count, int) or count < 1:
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
    try:
        channels, *size = input_size(model)
    except UnsupportedHostError:
        if source := getattr(model, "pretrained_cfg", None):
            channels, *size = source["input_size"] if source.get("fixed_input_size") else source["input_size"][:1]
        else:  # of Hugging Face: images are resized to what it was trained on
            channels, side = getattr(model.config, "num_channels", 3), getattr(model.config, "image_size", None)
            size = [side, side] if isinstance(side, int) else list(side or ())
    return channels, (size[0], size[1]) if size else None


def undecayed(model: nn.Module) -> set[str]:
    """Return patterns of the parameters that take no weight decay: biases by token, and position and class tokens."""
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    return {f"*{name}" for name in (*exempt, "cls_token", "mask_token", "position_embeddings")}
