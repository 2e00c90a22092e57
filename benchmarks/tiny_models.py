"""Every ViT-like model that the census asks about, built tiny: few blocks, few heads, small images, 7 classes.

A timm name keeps everything that makes it another model (its layers, norms, tokens, position embeddings) and only its
size changes. What size its class can take is found by trying: the first of several sets of arguments that builds a
model which runs on an image is used, the plain model last.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import timm
import torch
from timm.models import _registry
from torch import nn

CLASSES = 7
BLOCKS = 4
STAGES = (1, 2, 1, 1)  # blocks of each stage; two in the second, since windows shift in every second block
TWO_STAGES = {"depths": [2, 2], "num_heads": [3, 4], "window_size": 4}  # of Swins
SHAPES = ((3, 8), (4, 16), None)  # heads and their width; None: as wide as the name says
DEPTHS = ("depth", "depths", "layers", "stages", "serial_depths", "depth_list")  # how constructors call their blocks
IGNORED = ("cache_dir", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_filter_fn", "feature_cfg")

# The rule: all names of these modules of timm.models, which are those whose networks have attention between tokens
# (softmax or linear, over all of them, in windows, pooled, or beside convolutions), or which are called vision
# transformers or vision formers. Not: attention over channels inside a CNN (SE, ECA, CBAM), bottleneck attention in
# ResNets (byoanet), MLP mixers, state spaces.
MODULES = frozenset((
    "beit", "cait", "coat", "convit", "cpubone", "crossvit", "davit", "deepseek_vit", "deit", "edgenext",
    "efficientformer", "efficientformer_v2", "efficientvit_mit", "efficientvit_msra", "eva", "fastvit", "focalnet",
    "gcvit", "gemma4_vit", "hiera", "hieradet_sam2", "iformer", "levit", "lowformer", "maxxvit", "metaformer",
    "mobilenetv5", "mobilevit", "mvitv2", "naflexvit", "nest", "nextvit", "pit", "pvt_v2", "qwen3_vit", "repvit",
    "shvit", "swiftformer", "swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "tiny_vit", "tnt",
    "twins", "visformer", "vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos",
    "vision_transformer_sam", "vitamin", "volo", "xcit",
))  # fmt: skip


@dataclass(frozen=True)
class Built:
    """A tiny model."""

    model: nn.Module
    size: tuple[int, int, int]
    """(channels, height, width) of its images."""
    arguments: dict[str, Any]
    """What differs from the name's own arguments."""


class _AskedError(Exception):
    """Carries what timm would have constructed."""


def timm_names() -> list[str]:
    """Return the names of timm that the rule takes."""
    return [name for name in timm.list_models() if _registry._model_to_module[name] in MODULES]


def asked_of_timm(name: str, **options: Any) -> tuple[type, dict[str, Any]]:
    """Return the class and the arguments that timm would construct for a name, which it does not."""

    def stop(model_cls: type, variant: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
        raise _AskedError(model_cls, {key: value for key, value in arguments.items() if key not in IGNORED})

    with patch.object(_module(name), "build_model_with_cfg", stop):
        try:
            timm.create_model(name, **options)
        except _AskedError as asked:
            return asked.args[0], asked.args[1]
    raise AssertionError(f"{name} was constructed without build_model_with_cfg")


def timm_class(name: str) -> str:
    """Return the name of the class of a timm name, with its module where that is not the class's own."""
    cls, module = asked_of_timm(name)[0], _registry._model_to_module[name]
    return cls.__name__ if cls.__module__.endswith(f".{module}") else f"{cls.__name__} ({module})"


def kind_of(name: str) -> str:
    """Return a text that is the same for timm names which are the same model at tiny size."""
    if _library(name) != "timm":
        return name
    name = name.partition(":")[2]
    cls, arguments = asked_of_timm(name)
    arguments = _replaced(arguments, next(_options(name)))
    return f"{cls} {sorted((key, repr(value)) for key, value in arguments.items())}"


def build(name: str) -> Built:
    """Return the tiny model of `library:name`, in evaluation mode.

    Raises:
        RuntimeError: no set of arguments builds a model that runs; says why the last one did not.
    """
    torch.manual_seed(0)
    if _library(name) == "timm":
        return _build_timm(name.partition(":")[2])
    model, side = OTHERS[name]()
    return Built(model.eval(), (3, side, side), {})


def _library(name: str) -> str:
    return name.partition(":")[0]


def _replaced(arguments: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return a constructor's arguments with other ones in place of some, in its configuration too."""
    changed = arguments | options
    if dataclasses.is_dataclass(config := arguments.get("cfg")):
        known = {item.name for item in dataclasses.fields(config)}
        changed["cfg"] = dataclasses.replace(config, **{key: options[key] for key in options.keys() & known})
        changed = {key: value for key, value in changed.items() if key not in known}
    return changed


def _module(name: str) -> Any:
    return importlib.import_module(f"timm.models.{_registry._model_to_module[name]}")


def _settings(cls: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return every setting of a timm model by name: defaults of its classes, its configuration, its arguments."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        found |= {item.name: item.default for item in inspect.signature(base.__init__).parameters.values()}  # type: ignore[misc]
    if dataclasses.is_dataclass(arguments.get("cfg")):
        found |= {item.name: getattr(arguments["cfg"], item.name) for item in dataclasses.fields(arguments["cfg"])}
    return found | dict(arguments)


def _shortened(value: Any) -> Any:
    """Return a number of blocks, or of blocks by stage, made small; None where it is something else."""
    if isinstance(value, int):
        return min(value, BLOCKS)
    if isinstance(value, (list, tuple)) and all(isinstance(item, int) for item in value):
        return [min(blocks, few) for blocks, few in zip(value, itertools.chain(STAGES, itertools.repeat(1)))]
    return None


def _short(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments that leave few blocks."""
    found = {name: _shortened(settings[name]) for name in DEPTHS if name in settings}
    return {name: value for name, value in found.items() if value is not None}


def _narrow(settings: Mapping[str, Any], heads: int, head_width: int) -> dict[str, Any]:
    """Return arguments that leave few heads and small ones; none where it is not known how."""
    dim, own = settings.get("embed_dim"), settings.get("num_heads")
    dims = settings.get("embed_dims")
    if isinstance(dims, (tuple, list)):
        stages = [sorted(set(dims)).index(width) + 1 for width in dims]  # alike where they are alike
        if isinstance(own, (tuple, list)) and len(dims) == len(own):
            return {"num_heads": stages, "embed_dims": [8 * stage for stage in stages]}
        return {"embed_dims": [64 * stage for stage in stages]}  # heads of a width of their own
    if "use_mlp_head" in settings:  # a MetaFormer, whose heads are 32 wide
        return {"dims": [32, 32, 32, 64]}
    if not isinstance(dim, int):
        return {}
    if not isinstance(own, int):
        return {"embed_dim": heads * head_width} | {key: TWO_STAGES[key] for key in TWO_STAGES.keys() & settings.keys()}
    narrow: dict[str, Any] = {"embed_dim": heads * head_width, "num_heads": heads}
    if isinstance(settings.get("head_dim"), int):
        narrow["head_dim"] = head_width
    if (shared := settings.get("num_kv_heads")) is not None:
        fewer = [heads if number == own else 1 for number in ([shared] if isinstance(shared, int) else shared)]
        narrow["num_kv_heads"] = fewer[0] if isinstance(shared, int) else fewer[:BLOCKS]
    if isinstance(settings.get("intermediate_size"), int):
        narrow["intermediate_size"] = 3 * heads * head_width
    return narrow


def _options(name: str) -> Iterator[dict[str, Any]]:
    """Yield sets of arguments for timm.create_model that make a name small, from the smallest to its own size."""
    cls, arguments = asked_of_timm(name)
    settings = _settings(cls, arguments)
    patch_size = settings.get("patch_size")
    columns = isinstance(patch_size, int) and patch_size >= 8
    sides = (4 * patch_size, 6 * patch_size) if columns else (64, 128)
    small = [_short(settings) | ({} if shape is None else _narrow(settings, *shape)) for shape in SHAPES]
    for shrunk in (*small, {}):
        for side in (*sides, None):
            image: dict[str, Any] = {}
            if side is not None:
                image = {"pretrained_cfg_overlay": {"input_size": (3, side, side)}}
                image |= {"img_size": side} if "img_size" in settings else {}
                windows = settings.get("window_size")
                image |= (
                    {"window_size": 2 if columns else 4}
                    if isinstance(windows, int) and "window_size" not in shrunk
                    else {}
                )
            yield {"num_classes": CLASSES, **shrunk, **image}


def _made_by_timm(name: str, options: dict[str, Any]) -> nn.Module:
    """Return the model that timm makes of a name, with these arguments wherever they can be given."""
    make = _module(name).build_model_with_cfg
    forced: dict[str, Any] = {}

    def shrink(*args: Any, model_cfg: Any = None, **arguments: Any) -> nn.Module:
        if dataclasses.is_dataclass(model_cfg):
            fields = {item.name: getattr(model_cfg, item.name) for item in dataclasses.fields(model_cfg)}
            changes = _short(fields)
            if dataclasses.is_dataclass(within := fields.get("transformer_cfg")):
                widths = [8 * (1 + stage // 2) for stage in range(len(fields["embed_dim"]))]  # goes with groups before
                changes |= {"transformer_cfg": dataclasses.replace(within, dim_head=8), "stem_width": 8}
                changes["embed_dim"] = widths
            elif isinstance(fields.get("embed_dim"), (tuple, list)):
                changes["embed_dim"] = [32 * heads for heads in fields["num_heads"]]
            model_cfg = dataclasses.replace(model_cfg, **changes)
        return make(*args, model_cfg=model_cfg, **{**arguments, **forced})

    # A configuration, or what a name fixes itself, cannot be given to create_model: it is changed on its way.
    with patch.multiple(_module(name), build_model_with_cfg=shrink, **_stems(name, options.get("embed_dim"))):
        try:
            return timm.create_model(name, **options)
        except TypeError as error:
            if "multiple values" not in str(error):
                raise
            forced = options
            return timm.create_model(name)


def _stems(name: str, dim: int | None) -> dict[str, Any]:
    """Return makers of a timm module's convolutions before the blocks, by name, whose width no argument says."""

    def narrow(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def made(cfg: Any = None, channels: tuple[int, ...] = (), **arguments: Any) -> nn.Module:
            if cfg is None:
                return make(channels=(8,) * (len(channels) - 1) + (dim,), **arguments)
            return make(cfg=dataclasses.replace(cfg, stem_width=8, embed_dim=(8, 16, dim)), **arguments)

        return made

    own = vars(_module(name))
    return {key: narrow(own[key]) for key in ("MbConvStages", "ConvStem") if dim and key in own}


def _build_timm(name: str) -> Built:
    why: Exception | None = None
    for options in _options(name):
        try:
            model = _made_by_timm(name, options).eval()
            size = tuple(model.pretrained_cfg["input_size"])
            with torch.no_grad():
                model(torch.randn(2, *size))
            return Built(model, size, options)
        except Exception as error:  # constructors refuse in every way there is
            why = error
    raise RuntimeError(f"no arguments build a {name} that runs: {why}")


# transformers: what its configurations call the same things.
_COLUMNS = {"hidden_size": 24, "num_hidden_layers": BLOCKS, "num_attention_heads": 3, "intermediate_size": 72}
_IMAGE = {"image_size": 32, "patch_size": 8}
_PLAIN = {**_COLUMNS, **_IMAGE}
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 4], "window_size": 4}
_STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 3, 4]}
_SIDE = 32
_TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTConfig": ("ViTModel ViTForImageClassification ViTForMaskedImageModeling", {**_PLAIN, "encoder_stride": 8}),
    "DeiTConfig": (
        "DeiTModel DeiTForImageClassification DeiTForImageClassificationWithTeacher DeiTForMaskedImageModeling",
        {**_PLAIN, "encoder_stride": 8},
    ),
    "Dinov2Config": ("Dinov2Model Dinov2ForImageClassification Dinov2Backbone", {**_PLAIN, "mlp_ratio": 3}),
    "Dinov2Config swiglu": ("Dinov2Model", {**_PLAIN, "mlp_ratio": 3, "use_swiglu_ffn": True}),
    "Dinov2WithRegistersConfig": (
        "Dinov2WithRegistersModel Dinov2WithRegistersForImageClassification Dinov2WithRegistersBackbone",
        {**_PLAIN, "mlp_ratio": 3},
    ),
    "DINOv3ViTConfig": ("DINOv3ViTModel DINOv3ViTBackbone", {**_PLAIN, "num_register_tokens": 4}),
    "DINOv3ViTConfig gated": ("DINOv3ViTModel", {**_PLAIN, "num_register_tokens": 4, "use_gated_mlp": True}),
    "SiglipVisionConfig": ("SiglipVisionModel", _PLAIN),
    "SiglipConfig": ("SiglipForImageClassification", {"vision_config": _PLAIN, "text_config": _COLUMNS}),
    "Siglip2VisionConfig": ("Siglip2VisionModel", {**_COLUMNS, "patch_size": 8, "num_patches": 16}),
    "CLIPVisionConfig": ("CLIPVisionModel CLIPVisionModelWithProjection", {**_PLAIN, "projection_dim": 16}),
    "CLIPConfig": ("CLIPForImageClassification", {"vision_config": _PLAIN, "text_config": _COLUMNS}),
    "BeitConfig": (
        "BeitModel BeitForImageClassification",
        {**_PLAIN, "use_relative_position_bias": True, "out_indices": [1, 2, 3, 4]},
    ),
    "Data2VecVisionConfig": ("Data2VecVisionModel Data2VecVisionForImageClassification", _PLAIN),
    "ViTMAEConfig": ("ViTMAEModel ViTMAEForPreTraining", {**_PLAIN, "mask_ratio": 0.5}),
    "IJepaConfig": ("IJepaModel IJepaForImageClassification", _PLAIN),
    "ViTMSNConfig": ("ViTMSNModel ViTMSNForImageClassification", _PLAIN),
    "Aimv2VisionConfig": ("Aimv2VisionModel", _PLAIN),
    "SamVisionConfig": (
        "SamVisionModel",
        {**_PLAIN, "mlp_dim": 72, "window_size": 2, "global_attn_indexes": [1], "output_channels": 16},
    ),
    "YolosConfig": (
        "YolosModel YolosForObjectDetection",
        {**_PLAIN, "image_size": [32, 32], "num_detection_tokens": 5},
    ),
    "DPTConfig": (
        "DPTModel",
        {**_PLAIN, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8},
    ),
    "SwinConfig": ("SwinModel SwinForImageClassification", _SWIN),
    "Swinv2Config": ("Swinv2Model Swinv2ForImageClassification", _SWIN),
    "HieraConfig": (
        "HieraModel HieraForImageClassification",
        {
            "image_size": [64, 64], "patch_size": [7, 7], "embed_dim": 8, "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 4, 8], "masked_unit_size": [8, 8],
        },
    ),
    "PvtConfig": ("PvtModel PvtForImageClassification", {"image_size": 64, **_STAGES}),
    "PvtV2Config": ("PvtV2Model PvtV2ForImageClassification", {"image_size": 64, **_STAGES}),
    "SegformerConfig": (
        "SegformerModel SegformerForImageClassification SegformerForSemanticSegmentation",
        {"image_size": 64, **_STAGES, "decoder_hidden_size": 8},
    ),
    "MobileViTConfig": (
        "MobileViTModel",
        {"image_size": 64, "hidden_sizes": [24, 24, 32], "neck_hidden_sizes": [8] * 6 + [32], "num_attention_heads": 4},
    ),
    "TimmWrapperConfig": ("TimmWrapperModel TimmWrapperForImageClassification", {"architecture": "test_vit"}),
}  # fmt: skip


def _transformers_model(config: str, cls: str, options: dict[str, Any]) -> Callable[[], tuple[nn.Module, int]]:
    def make() -> tuple[nn.Module, int]:
        library = importlib.import_module("transformers")
        made = getattr(library, config.split()[0])(**options, num_labels=CLASSES)
        side = options.get("image_size", 160 if "architecture" in options else _SIDE)
        return getattr(library, cls)(made), side[0] if isinstance(side, list) else side

    return make


def _torchvision_vit() -> tuple[nn.Module, int]:
    models = importlib.import_module("torchvision.models")
    return models.VisionTransformer(32, 8, BLOCKS, 3, 24, 72, num_classes=CLASSES), 32


def _torchvision_swin(version: int) -> tuple[nn.Module, int]:
    swin = importlib.import_module("torchvision.models.swin_transformer")
    parts = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if version == 2 else {}
    return swin.SwinTransformer([2, 2], 24, [2, 2], [3, 4], [4, 4], num_classes=CLASSES, **parts), 32


def _torchvision_maxvit() -> tuple[nn.Module, int]:
    models = importlib.import_module("torchvision.models")
    return models.MaxVit((64, 64), 8, 4, [16, 16], [1, 1], 8, 0.0, num_classes=CLASSES), 64


def _vit_pytorch(cls: str) -> tuple[nn.Module, int]:
    library = importlib.import_module("vit_pytorch")
    settings = {"image_size": 32, "patch_size": 8, "num_classes": CLASSES, "dim": 24, "depth": BLOCKS, "heads": 3}
    return getattr(library, cls)(**settings, mlp_dim=72, dim_head=8), 32


OTHERS: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    "torchvision:vit_b_16": _torchvision_vit,
    "torchvision:swin_t": lambda: _torchvision_swin(1),
    "torchvision:swin_v2_t": lambda: _torchvision_swin(2),
    "torchvision:maxvit_t": _torchvision_maxvit,
    "vit-pytorch:ViT": lambda: _vit_pytorch("ViT"),
    "vit-pytorch:SimpleViT": lambda: _vit_pytorch("SimpleViT"),
} | {
    f"transformers:{' '.join([cls, *config.split()[1:]])}": _transformers_model(config, cls, options)
    for config, (classes, options) in _TRANSFORMERS.items()
    for cls in classes.split()
}


@cache
def names() -> tuple[str, ...]:
    """Return the names of the census, as `library:name`."""
    return (*(f"timm:{name}" for name in timm_names()), *OTHERS)
