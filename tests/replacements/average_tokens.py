"""A replacement that spvit does not have: every grid token becomes the average of its 3 x 3 neighbours.

Nothing of it is learned; prefix tokens pass as they are. test_new_kind.py adds it by one line of the registry.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spvit.architecture import Attention, Rules
from spvit.cost import AttentionCost, count_params
from spvit.hosts.grid import Grid, as_tokens
from spvit.hosts.host import Host
from spvit.hosts.sites import AttentionSite
from spvit.hosts.walk import BlockPair


class Average(nn.Module):
    """Averages 3 x 3 neighbours, and scales the channels."""

    def __init__(self, prefix_tokens: int, grid: Grid, dim: int, like: dict[str, Any]) -> None:
        super().__init__()
        self.prefix_tokens, self.grid = prefix_tokens, grid
        self.pool = nn.AvgPool2d(3, stride=1, padding=1)
        self.scale = nn.Parameter(torch.ones(dim, **like))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: [B, N, D]. Returns [B, N, D]."""
        grid = self.scale * as_tokens(self.pool(self.grid.as_map(x[:, self.prefix_tokens :])))
        return torch.cat([x[:, : self.prefix_tokens], grid], dim=1)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Do nothing: there are no windows here."""


class _Average:
    """The kind `average`."""

    def make(
        self, layer: nn.Module, site: AttentionSite, kept: Attention, rules: Rules, grid: Grid, **hints: Any
    ) -> nn.Module:
        parameter = next(layer.parameters())
        like = {"device": parameter.device, "dtype": parameter.dtype}
        return Average(site.prefix_tokens, grid, site.dim, like)

    def fit(self, module: nn.Module, pair: BlockPair, kept: Attention) -> None:
        """Scale each channel by least squares."""
        assert isinstance(module, Average)
        site = pair.sites.attention
        prefix, products, squares = site.prefix_tokens, 0.0, 0.0
        for x, wanted in zip(pair.arriving(site.path), pair.wanted(site.path)):
            average = as_tokens(module.pool(module.grid.as_map(x[:, prefix:]))).double()
            products = products + (average * site.own_grid().gather(wanted, prefix)).sum((0, 1))
            squares = squares + average.square().sum((0, 1))
        module.scale.copy_(products / squares)

    def cost(self, host: Host, site: AttentionSite, metric: str) -> AttentionCost:
        if metric == "macs":
            return AttentionCost(0)  # pooling multiplies nothing
        norm = 0 if site.norm is None else count_params(host.model.get_submodule(site.norm))
        return AttentionCost(norm + site.dim)


REPLACEMENT = _Average()
