"""What the families of timm share: how their models are described and made again, and packed projections."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from spvit.errors import UnsupportedHostError
from spvit.hosts.sites import Rows


def packed(heads: int, head_width: int) -> tuple[Rows, Rows, Rows]:
    """Return where queries, keys and values are made in a layer that packs them as timm does."""
    rows = heads * head_width
    return Rows("qkv"), Rows("qkv", rows), Rows("qkv", 2 * rows)


def describe_timm_model(host: Any) -> dict[str, Any]:
    """Return the timm model name and arguments that a host was created with, and its class, as JSON values.

    Raises:
        UnsupportedHostError: the host was not made by timm.create_model, or with values that no file can hold.
    """
    config = getattr(host, "pretrained_cfg", None)
    arguments = getattr(host, "_model_args", None)
    if not config or arguments is None:
        raise UnsupportedHostError(
            "this timm model was not made by timm.create_model, so its name and arguments are not known and it "
            "cannot be rebuilt from a file; make it with timm.create_model"
        )
    # reset_classifier leaves the recorded arguments as they were.
    arguments = {**arguments, "num_classes": host.num_classes, "global_pool": host.global_pool}
    return {
        "library": "timm",
        "class": type(host).__name__,
        "name": config["architecture"],
        "arguments": _as_json(arguments),
    }


def make_timm_model(source: dict[str, Any]) -> nn.Module:
    """Make a timm model from its name and arguments, with random weights."""
    return timm.create_model(source["name"], **source["arguments"])


def _as_json(arguments: dict[str, Any]) -> dict[str, Any]:
    for name, value in arguments.items():
        if not isinstance(value, (str, int, float, bool, list, tuple, dict, type(None))):
            raise UnsupportedHostError(
                f"the model was created with {name}={value!r}, which cannot be written to a file; "
                "use a value that is a string, a number or a list"
            )
    return {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
