"""An FFN for some of its hidden units alone: its linear layers lose rows and columns.

Shapes: U hidden units, K of them that are kept.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from spvit.hosts.sites import FFNSite

Layer = TypeVar("Layer", bound=nn.Module)


def narrow_ffn(model: nn.Module, site: FFNSite, units: Tensor) -> dict[str, nn.Module]:
    """Return by dotted name what stands for the layers of an FFN that keeps these units, in this order. units: [K].

    A norm's mean and variance are then those of the kept units; the repair of the layer behind it makes up for that.
    """
    narrow = {}
    for path in site.linears:
        # Packed rows stay packed as they are, interleaved ones too.
        rows, places = (
            torch.cat([part.start + part.step * some for part in site.first if part.linear == path])
            for some in (units, torch.arange(len(units)))
        )
        narrow[path] = narrowed(model.get_submodule(path), rows[places.argsort()])
    narrow[site.second] = narrowed(model.get_submodule(site.second), units, axis=1)
    if site.norm is not None:
        narrow[site.norm] = narrowed(model.get_submodule(site.norm), units)
    return narrow


def narrowed(module: Layer, kept: Tensor, axis: int = 0) -> Layer:
    """Return a copy of a module with some of its outputs (axis 0) or inputs (axis 1) alone. kept: [K], indices.

    It is a linear layer; with axis 0 perhaps a norm over units, or a convolution of each by itself.
    """
    narrow: Any = copy.deepcopy(module)
    for name, parameter in module.named_parameters():
        if axis < parameter.dim():
            some = parameter.detach().index_select(axis, kept.to(parameter.device))
            setattr(narrow, name, nn.Parameter(some, parameter.requires_grad))
    if isinstance(module, nn.Linear):
        narrow.out_features, narrow.in_features = narrow.weight.shape
    elif isinstance(module, nn.Conv2d):
        narrow.groups = narrow.in_channels = narrow.out_channels = len(kept)
    elif hasattr(narrow, "normalized_shape"):
        narrow.normalized_shape = (len(kept),)
    return cast(Layer, narrow)


def is_depthwise(module: nn.Module, units: int) -> bool:
    """Return whether a module is a convolution of each of so many channels by itself."""
    return type(module) is nn.Conv2d and module.groups == module.in_channels == module.out_channels == units
