"""Tiny vision transformers of libraries, by family: 4 blocks of 3 heads, FFNs of 72 units, patches of 8 x 8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import timm
import torchvision
import transformers
import vit_pytorch
from torch import nn

from own_models import Expected

CLASSES = 7


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "mlp_ratio": 3}

    def build() -> nn.Module:
        model: nn.Module = timm.create_model(name, **{**small, "num_classes": CLASSES, **options})
        return model

    return build


def _transformers(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    small = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3}

    def build() -> nn.Module:
        settings = {**small, "intermediate_size": 72, "num_labels": CLASSES, **options}
        model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**settings))
        return model

    return build


def _torchvision() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 4, 3, 24, 72, num_classes=CLASSES)


def _vit_pytorch(name: str) -> Callable[[], nn.Module]:
    small = {"image_size": 32, "patch_size": 8, "num_classes": CLASSES, "dim": 24, "depth": 4, "heads": 3}

    def build() -> nn.Module:
        model: nn.Module = getattr(vit_pytorch, name)(**small, mlp_dim=72, dim_head=8)
        return model

    return build


LIBRARY: dict[str, Callable[[], nn.Module]] = {
    "timm eva02": _timm("eva02_tiny_patch14_224"),
    "timm dinov3": _timm("vit_small_patch16_dinov3"),
    "timm beit": _timm("beit_base_patch16_224"),
    "timm aimv2": _timm("aimv2_large_patch14_224"),
    "timm giant dinov2": _timm("vit_giant_patch14_dinov2", mlp_ratio=6),
    "transformers dinov2": _transformers("Dinov2ForImageClassification", "Dinov2Config", mlp_ratio=3),
    "transformers dinov3": _transformers("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4),
    "transformers siglip": _transformers("SiglipVisionModel", "SiglipVisionConfig"),
    "transformers clip": _transformers("CLIPVisionModelWithProjection", "CLIPVisionConfig", projection_dim=7),
    "transformers beit": _transformers("BeitForImageClassification", "BeitConfig", use_relative_position_bias=True),
    "transformers ijepa": _transformers("IJepaForImageClassification", "IJepaConfig"),
    "torchvision vit": _torchvision,
    "vit-pytorch vit": _vit_pytorch("ViT"),
    "vit-pytorch simple": _vit_pytorch("SimpleViT"),
}
BIASED = ("timm beit", "transformers beit")
"""Those in which the places of tokens act on the products of queries and keys."""
PREFIX = {"timm dinov3": 5, "transformers dinov3": 5, "timm aimv2": 0, "transformers siglip": 0}
PREFIX |= {"transformers ijepa": 0, "vit-pytorch simple": 0}
HEADLESS = ("transformers dinov3", "transformers siglip", "transformers clip")
LIBRARY_EXPECTED = {
    name: Expected(
        prefix_tokens=PREFIX.get(name, 1),
        narrows_queries=name not in BIASED,
        classes=0 if name in HEADLESS else CLASSES,
    )
    for name in LIBRARY
}


STAGES = {"depths": [2, 2], "num_heads": [3, 4], "patch_size": 2}
SWIN = {**STAGES, "embed_dim": 24, "window_size": 4, "mlp_ratio": 3.0}
SAM = {"image_size": 64, "output_channels": 16, "mlp_dim": 72, "window_size": 3, "global_attn_indexes": (1,)}


def _torchvision_swin(second: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        swin = torchvision.models.swin_transformer
        parts = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if second else {}
        sizes = {"patch_size": [2, 2], "embed_dim": 24, "window_size": [4, 4], "mlp_ratio": 3}
        model: nn.Module = swin.SwinTransformer(depths=[2, 2], num_heads=[3, 4], num_classes=CLASSES, **sizes, **parts)
        return model

    return build


WINDOWED: dict[str, Callable[[], nn.Module]] = {
    "swin_v2": _timm("swinv2_tiny_window8_256", **{**STAGES, "depth": None, "img_size": (24, 40), "window_size": 4}),
    "swin_v2_cr": _timm("swinv2_cr_tiny_224", **{**STAGES, "depth": None, "window_size": 4}),
    "sam": _timm("samvit_base_patch16", img_size=64, neck_chans=16, window_size=3, global_attn_indexes=(1,)),
    "torchvision": _torchvision_swin(False),  # maps of 18 x 14 and 9 x 7: padded
    "torchvision_v2": _torchvision_swin(True),
    "huggingface": lambda: transformers.SwinForImageClassification(
        transformers.SwinConfig(image_size=(36, 28), num_labels=CLASSES, **SWIN)
    ),
    "huggingface_v2": lambda: transformers.Swinv2Model(transformers.Swinv2Config(image_size=32, **SWIN)),
    "huggingface_sam": _transformers("SamVisionModel", "SamVisionConfig", **SAM),
}
"""Models whose attention works in windows of a map."""
_STAGED = Expected(prefix_tokens=0, narrows_queries=False, patch=2, stages=True)
_SAM = Expected(
    prefix_tokens=0, narrows_queries=False, narrows_values=False, grid=(8, 8), windows=(9, 1, 9, 9), classes=CLASSES
)
_TORCHVISION = replace(_STAGED, grid=(18, 14), windows=(20, 20, 6, 6), narrows_values=False)
WINDOWED_EXPECTED = {
    "swin_v2": replace(_STAGED, grid=(12, 20), windows=(15, 15, 6, 6)),
    "swin_v2_cr": replace(_STAGED, grid=(16, 16), windows=(16, 16, 4, 4)),
    "sam": _SAM,
    "torchvision": _TORCHVISION,
    "torchvision_v2": _TORCHVISION,
    "huggingface": replace(_TORCHVISION, narrows_values=True),
    "huggingface_v2": replace(_STAGED, grid=(16, 16), windows=(16, 16, 4, 4), classes=0),
    "huggingface_sam": replace(_SAM, classes=0),
}
