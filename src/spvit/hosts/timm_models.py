"""What the families of timm share: parts of their blocks, and how their models are described and made again."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import timm
from timm.layers import Mlp
from torch import nn

from spvit.errors import ModelError, UnknownPartError
from spvit.hosts.sites import FFNSite, Rows, UnitRows, expect


class TimmFamily:
    """Base of the families of timm."""

    name: str

    def expect_parts(self, model: nn.Module, path: str, attention: type) -> None:
        """Raise UnknownPartError unless a block's attention and FFN are timm's own, without norms on its units."""
        expect(model, f"{path}.attn", attention, self.name)
        expect(model, f"{path}.mlp", Mlp, self.name)
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            expect(model, f"{path}.{part}", nn.Linear, self.name)
        norm = model.get_submodule(f"{path}.mlp.norm")
        if not isinstance(norm, nn.Identity):
            raise UnknownPartError(
                f"{path}.mlp.norm is a {type(norm).__name__} over the hidden units, which pruning would change; use a "
                "model without a norm there (scale_mlp_norm)"
            )

    def parts(self, model: nn.Module, path: str, heads: int, head_width: int) -> tuple[dict[str, Any], FFNSite]:
        """Return what all attention sites of timm say alike, and the site of the FFN."""
        block: Any = model.get_submodule(path)
        rows = heads * head_width
        attention = {
            "path": f"{path}.attn",
            "query": Rows.of("qkv", block.attn),
            "key": Rows.of("qkv", block.attn, rows),
            "value": Rows.of("qkv", block.attn, 2 * rows),
            "out": Rows.of("proj", block.attn),
            "dim": block.attn.qkv.in_features,
            "heads": heads,
            "head_width": head_width,
        }
        units = block.mlp.fc1.out_features
        return attention, FFNSite((UnitRows(f"{path}.mlp.fc1"),), f"{path}.mlp.fc2", units)

    def input_size(self, model: Any) -> tuple[int, int, int]:
        """Return (channels, height, width) of the images that the model takes."""
        embed = model.patch_embed
        return (embed.proj.in_channels, embed.img_size[0], embed.img_size[1])

    def classes(self, model: Any) -> int:
        """Return how many classes the head tells apart; 0 when the model has no head."""
        return int(model.num_classes)


def source_of(model: Any) -> dict[str, Any] | None:
    """Return what `build` needs to make any model of timm again, as JSON values.

    None if timm.create_model did not make it, or with values that no file can hold.
    """
    config = getattr(model, "pretrained_cfg", None)
    arguments = getattr(model, "_model_args", None)
    if not config or arguments is None:
        return None
    # reset_classifier leaves the recorded arguments as they were.
    now = {name: getattr(model, name, None) for name in ("num_classes", "global_pool")}
    arguments = {**arguments, **{name: value for name, value in now.items() if isinstance(value, (int, str))}}
    plain = (str, int, float, bool, list, tuple, dict, type(None))
    if not all(isinstance(value, plain) for value in arguments.values()):
        return None
    arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    name = {"class": type(model).__name__, "name": config["architecture"]}
    return {"library": "timm", **name, "arguments": arguments}


def build(source: dict[str, Any]) -> nn.Module:
    """Make a model with random weights from what `source_of` returned. Raises ModelError: see `check_timm_model`."""
    check_timm_model(source["name"], source["arguments"])
    return timm.create_model(source["name"], **source["arguments"])


def check_timm_model(name: str, arguments: Mapping[str, Any]) -> None:
    """Raise ModelError unless timm has registered the model and its classes have all of the arguments.

    So none names a file, a hub or code: `timm.create_model` would take `checkpoint_path` or `pretrained_cfg`.
    """
    if not name.isidentifier() or not timm.is_model(name):
        raise ModelError(f"{name!r} is no model that timm has registered")
    module = sys.modules[timm.model_entrypoint(name).__module__]
    classes = [item for item in vars(module).values() if isinstance(item, type) and issubclass(item, nn.Module)]
    known = {parameter for item in classes for parameter in inspect.signature(item.__init__).parameters}
    for argument in arguments:
        if argument not in known - {"self", "args", "kwargs"}:
            raise ModelError(f"{argument!r} is no argument of the model {name}; leave it out")
