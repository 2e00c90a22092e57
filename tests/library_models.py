"""Tiny vision transformers of libraries, by family: 4 blocks of 3 heads, FFNs of 72 units, patches of 8 x 8."""

from __future__ import annotations

from collections.abc import Callable
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
