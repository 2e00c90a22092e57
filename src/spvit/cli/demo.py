"""The demonstration: a small vision transformer on scikit-learn's digits, trained dense, then compressed."""

from __future__ import annotations

from spvit.cli.options import CompressCommand
from spvit.train.data import DIGITS, ImageConfig
from spvit.train.settings import PhaseConfig


def demo_settings(output: str, macs: str, seed: int) -> CompressCommand:
    """Return the whole configuration of the demonstration: what `spvit compress` would be told."""
    return CompressCommand(
        model="vit_tiny_patch16_224",
        model_args={
            "img_size": 8,
            "patch_size": 2,
            "in_chans": 1,
            "num_classes": 10,
            "embed_dim": 64,
            "depth": 6,
            "num_heads": 4,
        },
        pretrained=False,
        data=DIGITS,
        output=output,
        macs=macs,
        seed=seed,
        images=ImageConfig(
            batch_size=32, mean=(0.5,), std=(0.5,), crop=1.0, crop_scale=(0.85, 1.0), crop_ratio=(0.9, 1.1), flip=0.0
        ),
        dense=PhaseConfig(epochs=25, learning_rate=2e-3, warmup_epochs=1),
    )
