"""What spvit is compared with: architectures drawn at random, and Torch-Pruning."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import Tensor, nn

import spvit
from spvit.architecture import DEFAULT_MULTIPLE, FFN, KINDS, Architecture, Attention, Block
from spvit.budget import TOLERANCE
from spvit.cost import NetworkCost

TRIES = 8
TORCH_PRUNING_CLOSE, TORCH_PRUNING_TOLERANCE = 0.002, 0.01


def random_architecture(cost: NetworkCost, target: int, generator: random.Random) -> Architecture:
    """Return an architecture within tolerance of a target: random attention kinds, FFN widths and units."""
    for _ in range(1000):
        kinds = generator.choices(list(KINDS), k=len(cost.blocks))
        shares = [1 - generator.random() for _ in kinds]
        spent = cost.fixed + sum(block.attention(Attention(kind)) for block, kind in zip(cost.blocks, kinds))
        widths = _scaled_widths(cost, target - spent, shares)
        total = spent + sum(block.unit * width for block, width in zip(cost.blocks, widths))
        if abs(total - target) <= TOLERANCE * target:
            kept = [sorted(generator.sample(range(b.units), width)) for b, width in zip(cost.blocks, widths)]
            ffns = [FFN(block.units, tuple(units)) for block, units in zip(cost.blocks, kept)]
            return Architecture(tuple(Block(Attention(kind), ffn) for kind, ffn in zip(kinds, ffns)))
    raise spvit.BudgetError(f"none of 1,000 random draws came within {TOLERANCE:.1%} of {target:,} macs")


def _scaled_widths(cost: NetworkCost, macs: int, shares: list[float]) -> list[int]:
    """Return FFN widths in proportion to the shares, in whole multiples, whose cost is as near as can be."""

    def widths(scale: float) -> list[int]:
        wished = [DEFAULT_MULTIPLE * round(scale * s * b.units / DEFAULT_MULTIPLE) for s, b in zip(shares, cost.blocks)]
        return [min(block.units, max(DEFAULT_MULTIPLE, width)) for width, block in zip(wished, cost.blocks)]

    def excess(scale: float) -> int:
        return sum(block.unit * width for block, width in zip(cost.blocks, widths(scale))) - macs

    low, high = 0.0, 1 / min(shares)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return widths(min(low, high, key=lambda scale: abs(excess(scale))))


def taylor_gradients(dense: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return a model's gradients of the cross entropy by parameter, summed over labelled batches."""
    model = copy.deepcopy(dense).eval()
    for images, targets in batches:
        nn.functional.cross_entropy(model(images), targets).backward()
    return {name: cast(Tensor, parameter.grad) for name, parameter in model.named_parameters()}


def torch_pruned_to(
    dense: nn.Module,
    gradients: dict[str, Tensor],
    image: Tensor,
    macs_of: Callable[[nn.Module], int],
    target: int,
) -> nn.Module:
    """Return what Torch-Pruning leaves when its ratio is interpolated until the MACs are the target.

    Args:
        dense: the model.
        gradients: of its loss, for the Taylor importance.
        image: [1, channels, height, width].
        macs_of: counts a model's MACs.
        target: MACs.

    Raises:
        BudgetError: no ratio comes within 1 % of the target.
    """
    low, high, most, least, models = 0.0, 1.0, macs_of(dense), 0, []
    for _ in range(TRIES):
        ratio = low + (high - low) * (most - target) / (most - least)
        model = torch_pruned(dense, gradients, image, ratio)
        macs = macs_of(model)
        models.append((abs(macs - target), ratio, model))
        if abs(macs - target) <= TORCH_PRUNING_CLOSE * target:
            break
        low, most, high, least = (ratio, macs, high, least) if macs > target else (low, most, ratio, macs)
    distance, _, model = min(models, key=lambda item: item[0])
    if distance > TORCH_PRUNING_TOLERANCE * target:
        raise spvit.BudgetError(f"the nearest that Torch-Pruning comes is {distance / target:.1%} away")
    return model


def torch_pruned(dense: nn.Module, gradients: dict[str, Tensor], image: Tensor, ratio: float) -> nn.Module:
    """Return a copy that Torch-Pruning has pruned inside attention and FFN; the embedding keeps its width."""
    import torch_pruning

    model: Any = copy.deepcopy(dense).eval()
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone()
    pruner = torch_pruning.pruner.BasePruner(
        model,
        image,
        importance=torch_pruning.importance.GroupTaylorImportance(),
        global_pruning=True,
        isomorphic=True,
        pruning_ratio=ratio,
        num_heads={block.attn.qkv: block.attn.num_heads for block in model.blocks},
        prune_num_heads=False,
        prune_head_dims=True,
        # All that writes to the residual stream is one group with the patch embedding: ignoring that keeps its width.
        ignored_layers=[model.patch_embed.proj, model.head],
        # Documented as a dictionary, but read as pairs of parameter and axis: tokens, positions, LayerScale.
        unwrapped_parameters=[(parameter, parameter.dim() - 1) for parameter in _unwrapped(model)],
        # Their defaults are shared by all pruners of the process, which would add up the heads of every copy.
        in_channel_groups={},
        out_channel_groups={},
    )
    pruner.step()
    for block in model.blocks:
        attention = block.attn
        attention.attn_dim = attention.proj.in_features
        attention.head_dim = attention.attn_dim // attention.num_heads
        attention.scale = attention.head_dim**-0.5
    model.zero_grad()
    return cast(nn.Module, model)


def _unwrapped(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are no layer's weight or bias."""
    return [parameter for name, parameter in model.named_parameters() if not name.endswith(("weight", "bias"))]


def torch_pruned_widths(model: Any) -> str:
    """Return the head and FFN widths of every block in one line."""
    heads = " ".join(str(block.attn.head_dim) for block in model.blocks)
    return f"head widths {heads}, FFN units {' '.join(str(block.mlp.fc1.out_features) for block in model.blocks)}"
