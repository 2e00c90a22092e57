"""What the families of timm share: parts of their blocks, and how their models are described and made again."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import timm
from timm.layers import Mlp
from torch import nn

from spvit.errors import ModelError, UnknownPartError, UnsupportedHostError
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

    def source(self, model: Any) -> dict[str, Any]:
        """Return the timm model name and arguments that a model was created with, and its class, as JSON values.

        Raises:
            UnsupportedHostError: the model was not made by timm.create_model, or with values that no file can hold.
        """
        source = source_of(model)
        if source is None:
            raise UnsupportedHostError(
                "this timm model was not made by timm.create_model, so its name and arguments are not known and it "
                "cannot be rebuilt from a file; make it with timm.create_model"
            )
        return source

    def build(self, source: dict[str, Any]) -> nn.Module:
        """Make a timm model from its name and arguments, with random weights."""
        return build(source)


def source_of(model: Any) -> dict[str, Any] | None:
    """Return what `build` needs to make any model of timm again; None if timm.create_model did not make it.

    Raises:
        UnsupportedHostError: it was made with values that no file can hold.
    """
    config = getattr(model, "pretrained_cfg", None)
    arguments = getattr(model, "_model_args", None)
    if not config or arguments is None:
        return None
    # reset_classifier leaves the recorded arguments as they were.
    now = {name: getattr(model, name, None) for name in ("num_classes", "global_pool")}
    now = {name: value for name, value in now.items() if isinstance(value, (int, str))}
    return {
        "library": "timm",
        "class": type(model).__name__,
        "name": config["architecture"],
        "arguments": _as_json({**arguments, **now}),
    }


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


def _as_json(arguments: dict[str, Any]) -> dict[str, Any]:
    for name, value in arguments.items():
        if not isinstance(value, (str, int, float, bool, list, tuple, dict, type(None))):
            raise UnsupportedHostError(
                f"the model was created with {name}={value!r}, which cannot be written to a file; "
                "use a value that is a string, a number or a list"
            )
    return {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
