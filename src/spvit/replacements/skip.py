"""Nothing in place of an attention layer: the block's residual connection alone, or a constant beside it.

Shapes: B batch, N tokens = P prefix tokens + G grid tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spvit.architecture import Attention, Rules
from spvit.cost import AttentionCost
from spvit.errors import CalibrationError
from spvit.hosts.grid import Grid
from spvit.hosts.host import Host
from spvit.hosts.sites import AttentionSite
from spvit.hosts.walk import BlockPair
from spvit.moments import NOT_FINITE
from spvit.replacements.targets import attention_targets


class Skip(nn.Module):
    """Adds what the architecture's `skip_rule` says in place of an attention layer's output.

    `zero`; `normalised_input`, as the published checkpoints do; or `mean`, constant vectors.
    """

    def __init__(self, rule: str, mean: Constant | None = None) -> None:
        super().__init__()
        self.rule = rule
        self.mean = mean

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: [B, N, D]. Returns [B, N, D]."""
        if self.mean is not None:
            return self.mean(x)
        return torch.zeros_like(x) if self.rule == "zero" else x

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Do nothing: timm's Swin says that its windows change, and there are none here."""

    def extra_repr(self) -> str:
        """Show the rule in the module's printed form."""
        return f"rule={self.rule!r}"


class NoNorm(nn.Identity):
    """Stands where the norm of a skipped layer was; its empty `weight` says device and dtype, as timm's Swin asks."""

    def __init__(self, parameter: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", parameter.detach().new_empty(0), persistent=False)


class Constant(nn.Module):
    """A vector for each prefix token and one for all grid tokens: `bias` [P + 1, D]."""

    def __init__(self, vectors: int, dim: int, like: dict[str, Any]) -> None:
        super().__init__()
        self.prefix_tokens = vectors - 1
        self.bias = nn.Parameter(torch.zeros(vectors, dim, **like))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, D] or, without prefix tokens, a map, of which only the shape counts. Returns the same shape."""
        blank, prefix = torch.zeros_like(x), self.prefix_tokens
        if prefix == 0:
            return blank + self.bias[0]
        return torch.cat([blank[:, :prefix] + self.bias[:prefix], blank[:, prefix:] + self.bias[prefix]], dim=1)


class _Skip:
    """The kind `skip`."""

    def make(
        self, layer: nn.Module, site: AttentionSite, kept: Attention, rules: Rules, grid: Grid, **hints: Any
    ) -> nn.Module:
        if rules.skip != "mean":
            return Skip(rules.skip)
        parameter = next(layer.parameters())
        like = {"device": parameter.device, "dtype": parameter.dtype}
        return Skip("mean", Constant(site.prefix_tokens + 1, site.dim, like))

    def fit(self, module: nn.Module, pair: BlockPair, kept: Attention) -> None:
        """Let the layer add the mean of its target: by prefix token, and one of all grid tokens."""
        assert isinstance(module, Skip)
        if module.mean is None:
            return
        site, total, count = pair.sites.attention, torch.zeros(()), 0
        for own, missing in attention_targets(pair):
            wanted = own if missing is None else own + missing
            grid = site.own_grid().gather(wanted, site.prefix_tokens).double().mean(dim=1, keepdim=True)
            # Without prefix tokens windows may outnumber images in what stands for them.
            parts = [wanted[:, : site.prefix_tokens].double(), grid] if site.prefix_tokens else [grid]
            total = total.to(grid) + torch.cat(parts, dim=1).sum(0)
            count += len(grid)
        if not total.isfinite().all():
            raise CalibrationError(NOT_FINITE)
        module.mean.bias.copy_(total / count)

    def cost(self, host: Host, site: AttentionSite, metric: str) -> AttentionCost:
        if metric == "macs":
            return AttentionCost(0)
        norm = host.norm_params(site)
        return AttentionCost(0, rules={"normalised_input": norm, "mean": (site.prefix_tokens + 1) * site.dim})


REPLACEMENT = _Skip()
