"""Hugging Face's ViTForImageClassification (extra `hf`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit import modeling_vit

from spvit.errors import UnsupportedHostError
from spvit.hosts.grid import Grid, GridTracker
from spvit.hosts.sites import AttentionSite, BlockSites, FFNSite, Rows, Undo, UnitRows, expect


class _HuggingFaceViT:
    """Adapter of ViTForImageClassification."""

    name = "Hugging Face ViTForImageClassification"
    temperature = 0.01

    def blocks(self, model: nn.Module) -> tuple[BlockSites, ...]:
        vit = cast(ViTForImageClassification, model).vit
        if not hasattr(vit, "layers") or not hasattr(modeling_vit, "ViTMLP"):
            raise UnsupportedHostError(
                f"this version of transformers lays {self.name} out differently; install the one of spvit[hf]"
            )
        grid = self._grid(model)
        return tuple(self._block(model, index, grid) for index in range(len(vit.layers)))

    def _block(self, model: nn.Module, index: int, grid: tuple[int, int]) -> BlockSites:
        path = f"vit.layers.{index}"
        layer: Any = model.get_submodule(path)
        expect(model, f"{path}.attention", modeling_vit.ViTAttention, self.name)
        expect(model, f"{path}.mlp", modeling_vit.ViTMLP, self.name)
        attention = layer.attention
        for part in (
            "attention.q_proj",
            "attention.k_proj",
            "attention.v_proj",
            "attention.o_proj",
            "mlp.fc1",
            "mlp.fc2",
        ):
            expect(model, f"{path}.{part}", nn.Linear, self.name)
        return BlockSites(
            path,
            AttentionSite(
                path=f"{path}.attention",
                norm=f"{path}.layernorm_before",
                query=Rows.of("q_proj", attention),
                key=Rows.of("k_proj", attention),
                value=Rows.of("v_proj", attention),
                out=Rows.of("o_proj", attention),
                dim=attention.q_proj.in_features,
                heads=attention.num_attention_heads,
                head_width=attention.head_dim,
                prefix_tokens=1,
                grid=grid,
                keys=1 + grid[0] * grid[1],
                narrows_queries=True,
                narrows_values=True,
                scale=attention.scaling,
                dropout=attention.attention_dropout,
                tuple_items=2,
            ),
            FFNSite((UnitRows(f"{path}.mlp.fc1"),), f"{path}.mlp.fc2", layer.mlp.fc1.out_features),
        )

    def _patch_size(self, model: nn.Module) -> tuple[int, int]:
        return _pair(cast(ViTForImageClassification, model).config.patch_size)

    def _grid(self, model: nn.Module) -> tuple[int, int]:
        patch = self._patch_size(model)
        _, height, width = self.input_size(model)
        return (height // patch[0], width // patch[1])

    def input_size(self, model: nn.Module) -> tuple[int, int, int]:
        config = cast(ViTForImageClassification, model).config
        return (config.num_channels, *_pair(config.image_size))

    def classes(self, model: nn.Module) -> int:
        vit = cast(ViTForImageClassification, model)
        return 0 if isinstance(vit.classifier, nn.Identity) else vit.config.num_labels

    def watch_grids(self, model: nn.Module, blocks: Sequence[int]) -> tuple[dict[int, Grid], list[Undo]]:
        """Return the one grid of all blocks, kept at the size of the images, which `interpolate_pos_encoding` frees."""
        if not blocks:
            return {}, []
        grid = Grid(*self._grid(model))
        embeddings: Any = cast(ViTForImageClassification, model).vit.embeddings
        tracker = GridTracker(grid, self._patch_size(model), pads=False)
        handle = embeddings.patch_embeddings.register_forward_pre_hook(tracker)
        return dict.fromkeys(blocks, grid), [handle.remove]

    whole_grids = watch_grids

    def source(self, model: nn.Module) -> dict[str, Any]:
        config = cast(ViTForImageClassification, model).config
        return {"library": "transformers", "config": config.to_diff_dict(), "attention": config._attn_implementation}

    def build(self, source: dict[str, Any]) -> nn.Module:
        config = ViTConfig.from_dict(source["config"], attn_implementation=source["attention"])
        return ViTForImageClassification(config)


def _pair(size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


FAMILY = _HuggingFaceViT()
