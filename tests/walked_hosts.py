"""Hosts whose blocks are walked in the tests of hidden states and kept views."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from own_models import PairViT
from spvit.hosts.host import Host, recognise
from tiny import HOSTS, images, make_host

SEVERAL_LAYERS = "a block of several layers"
WALKED_HOSTS = (*HOSTS, SEVERAL_LAYERS)


def host_and_images(name: str) -> tuple[nn.Module, Host, Tensor]:
    """Return a model of HOSTS, or one whose blocks are lists of layers, as a host, and images that it takes."""
    if name == SEVERAL_LAYERS:
        model, x = PairViT().eval(), torch.randn(2, 3, 32, 32)
        return model, recognise(model, x), x
    model = make_host(name, torch.float32)
    return model, Host.of(model), images(model)
