"""Parts of the peers that compress a timm ViT: what torch counts, moments of what layers get, narrower FFNs.

Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

BATCH = 64
ACTIVE = 0.01
"""Share of a batch's root mean square above which a unit counts as active (CORP's)."""


@torch.no_grad()
def macs_of(model: nn.Module, image: Tensor) -> int:
    """Return the MACs of one image's forward pass as torch counts them: linear, convolution, attention products.

    Counted without a device: on the CPU narrow attention fills up widths with zeros, as its fused kernel wants them.
    """
    twin = copy.deepcopy(model).to("meta").requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        twin(image[:1].to("meta"))
    return counter.get_total_flops() // 2


@dataclass
class Moments:
    """Sums over tokens of a layer's values, [D] and [D, D], in double precision."""

    count: int = 0
    first: Tensor | float = 0.0
    second: Tensor | float = 0.0
    active: Tensor | float = 0.0

    def add(self, values: Tensor) -> None:
        """Add values [..., D]."""
        values = values.flatten(0, -2)
        active = values.abs() > ACTIVE * values.square().mean().sqrt()
        values = values.double()
        self.count += len(values)
        self.first = self.first + values.sum(0)
        self.second = self.second + values.T @ values
        self.active = self.active + active.sum(0)

    @property
    def mean(self) -> Tensor:
        """The mean, [D]."""
        return cast(Tensor, self.first) / self.count

    @property
    def square(self) -> Tensor:
        """The second moment about zero, [D, D]."""
        return cast(Tensor, self.second) / self.count

    @property
    def covariance(self) -> Tensor:
        """The second moment about the mean, [D, D]."""
        return self.square - torch.outer(self.mean, self.mean)


@torch.no_grad()
def moments_of(model: nn.Module, layers: Sequence[nn.Module], batches: Sequence[Tensor]) -> dict[nn.Module, Moments]:
    """Return the moments of what layers get when a module runs on batches."""
    found = {layer: Moments() for layer in layers}
    with ExitStack() as stack:
        for layer in layers:
            hook = layer.register_forward_pre_hook(lambda module, args: found[module].add(args[0]))
            stack.callback(hook.remove)
        for batch in batches:
            model(batch)
    return found


@torch.no_grad()
def keep_units(ffn: Any, kept: Tensor, weights: Tensor, constant: Tensor | None = None) -> None:
    """Keep some units of an FFN; all are taken for weights @ kept units + constant: [units, kept], [units]."""
    first = nn.Linear(ffn.fc1.in_features, len(kept), ffn.fc1.bias is not None).to(ffn.fc1.weight)
    second = nn.Linear(len(kept), ffn.fc2.out_features).to(ffn.fc2.weight)
    first.weight.copy_(ffn.fc1.weight[kept])
    if ffn.fc1.bias is not None:
        first.bias.copy_(ffn.fc1.bias[kept])
    readers = ffn.fc2.weight.double()
    second.weight.copy_(readers @ weights)
    second.bias.copy_(torch.zeros_like(second.bias) if ffn.fc2.bias is None else ffn.fc2.bias)
    if constant is not None:
        second.bias.add_(readers @ constant)
    ffn.fc1, ffn.fc2 = first, second


def tokens_of(model: Any) -> int:
    """Return the tokens of an image."""
    return cast(int, model.patch_embed.num_patches + model.num_prefix_tokens)


@torch.no_grad()
def arriving(model: Any, images: Tensor) -> Iterator[Tensor]:
    """Yield what the first block gets, [B, N, D] a batch."""
    for batch in images.split(BATCH):
        yield model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(batch))))
