"""What a host costs, block by block: the table that every replacement fills for its own kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from spvit.architecture import KINDS, Architecture
from spvit.cost import METRICS, BlockCost, NetworkCost, count_params
from spvit.hosts.host import Host
from spvit.hosts.sites import BlockSites
from spvit.replacements import replacement
from spvit.replacements.install import check_fits, has_prefix
from spvit.replacements.prefix_only import prefix_attention_cost


def _block_cost(host: Host, block: BlockSites, metric: str) -> BlockCost:
    site, ffn = block.attention, block.ffn
    firsts: list[Any] = [host.model.get_submodule(rows.linear) for rows in ffn.first]
    second: Any = host.model.get_submodule(ffn.second)
    unit = sum(first.in_features for first in firsts) + second.out_features
    norm: Any = nn.Identity() if ffn.norm is None else host.model.get_submodule(ffn.norm)
    taps = norm.weight[0].numel() if isinstance(norm, nn.Conv2d) else 0
    biases = sum(first.bias is not None for first in firsts) + count_params(norm) // ffn.units
    kinds = {kind: replacement(kind).cost(host, site, metric) for kind in KINDS}
    units, each = (ffn.units, site.heads, site.head_width), unit + biases
    cost = BlockCost(kinds, (unit + taps) * site.tokens if metric == "macs" else each, *units)
    if block is not host.blocks[-1] or not has_prefix(site):
        return cost
    alone = {"msa": prefix_attention_cost(site, metric, kinds["msa"]), "skip": kinds["skip"]}
    prefix = BlockCost(alone, (unit + taps) * site.prefix_tokens if metric == "macs" else each, *units)
    return replace(cost, prefix_only=prefix)


def network_costs(model: nn.Module | Host) -> dict[str, NetworkCost]:
    """Return the costs of a dense model by metric. The fixed part is what its counted total leaves beside the sites."""
    host = Host.of(model)
    costs = {}
    for metric in METRICS:
        blocks = tuple(_block_cost(host, block, metric) for block in host.blocks)
        costs[metric] = NetworkCost(metric, host.totals[metric] - sum(block.dense for block in blocks), blocks)
    return costs


def cost(model: nn.Module | Host, architecture: Architecture | None = None) -> dict[str, int]:
    """Return what a dense model costs, or what an architecture of it would, without pruning.

    Args:
        model: the dense model.
        architecture: what would be kept of it; None for all.

    Returns:
        `macs` of one image at the model's own input size, and `params` as deployed (batch norms folded).

    Raises:
        ArchitectureError: the architecture is of another model.
        UnsupportedHostError: the model's family, or a part of it, is not known.
    """
    host = Host.of(model)
    if architecture is not None:
        check_fits(host, architecture)
    costs = network_costs(host)
    return {metric: item.dense if architecture is None else item.of(architecture) for metric, item in costs.items()}
