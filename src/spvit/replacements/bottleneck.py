"""Attention becomes a convolution: to the head width, batch norm, ReLU, and a linear layer back (paper section 3.2).

Its weights are mixed from the attention's own value and output projections (`kernels`), or fitted to its outputs.

Shapes: B batch, N tokens = P prefix tokens + G grid tokens (height x width, row-major), D width, E head width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from spvit.architecture import Attention, Rules
from spvit.cost import AttentionCost
from spvit.hosts.grid import Grid, as_tokens
from spvit.hosts.host import Host
from spvit.hosts.sites import AttentionSite
from spvit.hosts.walk import BlockPair
from spvit.hosts.weights import read_weights
from spvit.moments import low_rank_regression, ridge_for
from spvit.replacements.kernels import POSITIONS, BottleneckWeights, conv1_weights, conv3_weights, head_mix
from spvit.replacements.targets import Gathered, attention_targets

LINEAR_SIDE = 4.0
"""Standard deviations by which a repaired convolution's activations are moved to where ReLU is linear."""


@dataclass(frozen=True)
class Searched:
    """What a search has found for one convolution: its head mix [H, 9], and its batch norm."""

    mix: Tensor
    batchnorm: nn.BatchNorm2d


class BottleneckConv(nn.Module):
    """A 3 x 3 or 1 x 1 convolution to the head width, batch norm, ReLU, and a linear layer back.

    Prefix tokens go through `prefix`, which is an identity under the rule of that name. Takes the arguments of the
    attention layer that it replaces and ignores all but the tokens; windows are taken apart and put together again.
    """

    def __init__(
        self,
        weights: BottleneckWeights,
        batchnorm: nn.BatchNorm2d,
        prefix_tokens: int,
        grid: Grid,
        prefix_rule: str = "identity",
    ) -> None:
        super().__init__()
        width, dim = weights.in_weight.shape[:2]
        like: dict[str, Any] = {"device": weights.in_weight.device, "dtype": weights.in_weight.dtype}
        self.conv_in: nn.Conv2d | nn.Linear
        if weights.in_weight.dim() == 4:
            self.conv_in = nn.utils.skip_init(nn.Conv2d, dim, width, 3, padding=1, **like)
        else:
            self.conv_in = nn.utils.skip_init(nn.Linear, dim, width, **like)
        self.bn: nn.Module = batchnorm
        self.act = nn.ReLU()
        self.conv_out = nn.utils.skip_init(nn.Linear, width, dim, **like)
        self.prefix: nn.Module = nn.Identity()
        if prefix_tokens and prefix_rule == "linear":
            second = nn.Linear(width, dim, **like)
            for parameter in second.parameters():
                nn.init.zeros_(parameter)  # adds nothing until it is repaired or trained
            self.prefix = nn.Sequential(nn.Linear(dim, width, **like), second)
        self.prefix_tokens = prefix_tokens
        self.grid = grid
        with torch.no_grad():
            _bias(self.conv_in).copy_(weights.in_bias)
            _bias(self.conv_out).copy_(weights.out_bias)
            self.conv_in.weight.copy_(weights.in_weight)
            self.conv_out.weight.copy_(weights.out_weight)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: [B, N, D], normalised. Returns [B, N, D]."""
        tokens = self.grid.gather(x, self.prefix_tokens)  # [B, G, D]
        if isinstance(self.conv_in, nn.Conv2d):
            hidden = self.conv_in(self.grid.as_map(tokens))  # [B, E, height, width]
        else:
            hidden = self.grid.as_map(self.conv_in(tokens))
        hidden = self.act(self.bn(hidden))
        out = self.grid.scatter(self.conv_out(as_tokens(hidden)))  # [B, G, D]
        if self.prefix_tokens:
            out = torch.cat([self.prefix(x[:, : self.prefix_tokens]).to(out.dtype), out], dim=1)
        return out

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Do nothing: timm's Swin says that its windows change, and there are none here."""

    @torch.no_grad()
    def set_linear(self, inward: Tensor, mean: Tensor, variance: Tensor, outward: Tensor, out_mean: Tensor) -> None:
        """Make the layer the linear map `outward (inward x - mean) + out_mean` wherever ReLU lets it, in place.

        Batch norm moves the hidden activations LINEAR_SIDE standard deviations above zero; the output bias moves back.
        inward: [E, D] or, for a 3 x 3 convolution, [E, 9 D] with the nine positions of a channel side by side; mean,
        variance of `inward x`: [E]; outward: [D, E]; out_mean: [D].
        """
        assert isinstance(self.bn, nn.BatchNorm2d)
        spread = torch.sqrt(variance + self.bn.eps)
        self.conv_in.weight.copy_(inward.view_as(self.conv_in.weight))
        _bias(self.conv_in).zero_()
        for own, value in (
            (self.bn.running_mean, mean),
            (self.bn.running_var, variance),
            (self.bn.weight, torch.ones_like(mean)),
            (self.bn.bias, torch.full_like(mean, LINEAR_SIDE)),
            (self.conv_out.weight, outward * spread),
            (_bias(self.conv_out), out_mean - outward @ (spread * LINEAR_SIDE)),
        ):
            assert own is not None
            own.copy_(value)

    @torch.no_grad()
    def fold_batchnorm(self) -> None:
        """Fold the batch norm into the first layer, in place. The output in evaluation mode stays the same."""
        bn = self.bn
        if not isinstance(bn, nn.BatchNorm2d):
            return
        assert bn.running_mean is not None
        assert bn.running_var is not None
        fuse = fuse_conv_bn_weights if isinstance(self.conv_in, nn.Conv2d) else fuse_linear_bn_weights
        statistics = (bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
        weight, bias = fuse(self.conv_in.weight, self.conv_in.bias, *statistics)
        self.conv_in.weight.copy_(weight)
        _bias(self.conv_in).copy_(bias)
        self.bn = nn.Identity().train(self.training)


@dataclass(frozen=True)
class _Bottleneck:
    """The kinds `conv3` and `conv1`."""

    kind: str

    def make(
        self,
        layer: nn.Module,
        site: AttentionSite,
        kept: Attention,
        rules: Rules,
        grid: Grid,
        searched: Searched | None = None,
        **hints: Any,
    ) -> nn.Module:
        """As the method fine-tunes it: with the head mix and batch norm of a search, or equal and fresh ones."""
        weights = read_weights(layer, site)
        value_weight = weights.value_weight
        with torch.no_grad():
            equal = head_mix(value_weight.new_ones(site.heads, POSITIONS), 1.0)
            mix = equal if searched is None else searched.mix.to(value_weight)
            own = (conv3_weights if self.kind == "conv3" else conv1_weights)(mix, weights)
        batchnorm = nn.BatchNorm2d(site.head_width) if searched is None else copy.deepcopy(searched.batchnorm)
        return BottleneckConv(own, batchnorm.to(mix), site.prefix_tokens, grid, rules.prefix)

    def fit(self, module: nn.Module, pair: BlockPair, kept: Attention) -> None:
        """Fit both linear maps as one of their rank; ReLU stays linear at first, for training to bend."""
        assert isinstance(module, BottleneckConv)
        site = pair.sites.attention
        prefix = site.prefix_tokens
        gathered, gathered_prefix = Gathered(pair), Gathered(pair)
        for x, (own, missing) in zip(pair.arriving(site.path), attention_targets(pair)):
            tokens = module.grid.gather(x, prefix)
            if isinstance(module.conv_in, nn.Conv2d):
                tokens = F.unfold(module.grid.as_map(tokens), 3, padding=1).transpose(1, 2)  # [B, G, 9 D]
            left = None if missing is None else site.own_grid().gather(missing, prefix)
            gathered.add(tokens, site.own_grid().gather(own, prefix), left)
            if isinstance(module.prefix, nn.Sequential):
                left = None if missing is None else missing[:, :prefix]
                gathered_prefix.add(x[:, :prefix], own[:, :prefix], left)
        moments = gathered.moments(biased=True)
        rank = len(module.conv_in.weight)
        covariance, cross = moments.products(centred=True)
        inward, outward = low_rank_regression(covariance, cross, ridge_for(moments), rank)
        variance = ((covariance @ inward) * inward).sum(0)
        module.set_linear(inward.T, inward.T @ moments.mean_x, variance, outward.T, moments.mean_y)
        if isinstance(module.prefix, nn.Sequential):
            first, second = cast(nn.Linear, module.prefix[0]), cast(nn.Linear, module.prefix[1])
            moments = gathered_prefix.moments(biased=True)
            inward, outward = low_rank_regression(*moments.products(centred=True), ridge_for(moments), rank)
            first.weight.copy_(inward.T)
            first.bias.copy_(-inward.T @ moments.mean_x)
            second.weight.copy_(outward.T)
            second.bias.copy_(moments.mean_y)

    def cost(self, host: Host, site: AttentionSite, metric: str) -> AttentionCost:
        """Nine positions, or one, to the head width and one map back; the linear prefix rule is two more maps."""
        maps = 10 if self.kind == "conv3" else 2
        bottleneck = site.dim * site.head_width
        if metric == "macs":
            tokens = site.grid[0] * site.grid[1]
            return AttentionCost(maps * bottleneck * tokens, rules={"linear": 2 * bottleneck * site.prefix_tokens})
        norm = host.norm_params(site)
        biases = site.dim + site.head_width
        linear = 2 * bottleneck + biases if site.prefix_tokens else 0
        return AttentionCost(norm + maps * bottleneck + biases, rules={"linear": linear})


CONV3 = _Bottleneck("conv3")
CONV1 = _Bottleneck("conv1")


def _bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    assert layer.bias is not None
    return layer.bias
