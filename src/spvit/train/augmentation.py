"""A repair of timm's automatic augmentation, which newer Pillow versions stop in the middle of an epoch."""

from __future__ import annotations

from typing import Any

from PIL import Image


def keep_a_bit(training: Any) -> Any:
    """Return timm's training transform with posterizing that always keeps a bit.

    At its strongest timm asks for none. Pillow used to return a black image for that; version 13 raises ValueError.
    """
    for part in training.transforms:
        nested = [getattr(part, "ops", []), *getattr(part, "policy", [])]
        for operation in (operation for group in nested for operation in group):
            if getattr(operation, "name", "").startswith("Posterize"):
                operation.aug_fn = posterize
    return training


def posterize(image: Image.Image, bits: int, **others: Any) -> Image.Image:
    """Return an image with so many bits a channel, one at least."""
    from timm.data.auto_augment import posterize as timm_posterize

    posterized: Image.Image = timm_posterize(image, max(1, bits), **others)
    return posterized
