"""The published architectures as models. Importing this file registers them with timm.

import spvit.zoo
model = timm.create_model("spvit_deit_tiny_patch16_224", num_classes=10)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
from timm.models import register_model
from torch import nn

from spvit.architecture import Architecture, Attention, architectures
from spvit.cost import count_params
from spvit.errors import ZooError
from spvit.hosts.host import Host
from spvit.replacements.costs import network_costs
from spvit.replacements.kernels import POSITIONS
from spvit.surgery import prune


def host_name(name: str) -> str:
    """Return the timm model that a published model was pruned from. Raises ZooError when there is no such model."""
    if name not in architectures():
        raise ZooError(f"published model {name!r} is unknown, expected one of {', '.join(architectures())}")
    return name.removeprefix("spvit_").replace("_11g", "")  # two architectures are of DeiT-B


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return a published architecture as a pruned network with random weights, its batch norms not yet folded.

    Args:
        name: one of `spvit.architectures()`.
        pretrained: refused, since there are no weights to download.
        kwargs: what timm's model of the host takes, such as num_classes, img_size, drop_path_rate.

    Raises:
        ZooError: the name is unknown, or pretrained weights are asked for.
        ArchitectureError: arguments such as depth or mlp_ratio give another host than the architecture is for.
    """
    dense = host_name(name)
    if pretrained:
        raise ZooError(
            f"{name} has no pretrained weights: the publication does not offer them in a form that can be downloaded "
            f"here; pass pretrained=False, and load your own weights or prune {dense} with its pretrained ones"
        )
    return prune(timm.create_model(dense, **kwargs), architectures()[name], inplace=True)


def unfolded_params(host: nn.Module, architecture: Architecture) -> int:
    """Return the parameters of an architecture as the publication counts them.

    There a convolution has the whole W_v and W_o of the attention that it replaces, its head mix logits and its batch
    norm; in a deployed network all of these are folded into two small layers.

    Args:
        host: the dense model.
        architecture: what is kept of it.
    """
    dense = Host.of(host)
    cost = network_costs(dense)["params"]
    total = cost.of(architecture)
    for index, kind in enumerate(architecture.kinds()):
        if kind not in ("conv3", "conv1"):
            continue
        site, weights = dense.blocks[index].attention, dense.weights(index)
        shared = (weights.value_weight, weights.value_bias, weights.out_weight, weights.out_bias)
        whole = sum(tensor.numel() for tensor in shared if tensor is not None)
        mix_and_norm = site.heads * POSITIONS + 2 * site.head_width
        norm = 0 if site.norm is None else count_params(dense.model.get_submodule(site.norm))
        total += whole + mix_and_norm - (cost.blocks[index].attention(Attention(kind)) - norm)
    return total


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create_model(name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"The published architecture {name}, pruned from {host_name(name)}."
    return create


for _name in architectures():
    globals()[_name] = register_model(_entry_point(_name))
