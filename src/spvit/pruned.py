"""What replaces an attention layer: a bottleneck convolution or nothing. Stock layers inside, any grid.

Shapes: B batch, N tokens = P prefix tokens + G grid tokens (height x width, row-major), D width, E hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spvit.kernels import BottleneckWeights, fold_batchnorm


@dataclass
class Grid:
    """The patch grid of the images that a block now works on, kept up to date by the host (`Family.track_grids`)."""

    height: int
    width: int

    def size(self, x: Tensor, prefix_tokens: int) -> tuple[int, int]:
        """Return (height, width) for tokens x: [B, N, D]. Raises ValueError when their number does not fit."""
        if x.shape[1] != prefix_tokens + self.height * self.width:
            raise ValueError(
                f"a convolution got {x.shape[1]} tokens, expected {prefix_tokens} prefix tokens and a grid of "
                f"{self.height} x {self.width}; call the whole model on images, and do not drop patches"
            )
        return self.height, self.width

    def gather(self, x: Tensor, prefix_tokens: int) -> Tensor:
        """Return the grid tokens, row-major [B, G, D], of what attention gets: [B, N, D]. Raises ValueError as `size`.

        A family whose attention gets the grid in another form has a subclass for it.
        """
        self.size(x, prefix_tokens)
        return x[:, prefix_tokens:]

    def scatter(self, tokens: Tensor) -> Tensor:
        """Return grid tokens [B, G, D] in the form in which attention answers (without prefix tokens)."""
        return tokens


def as_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Return grid tokens [B, G, D] as a feature map [B, D, height, width] (channels last in memory, no copy)."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)


def as_tokens(feature_map: Tensor) -> Tensor:
    """Return a feature map [B, D, height, width] as grid tokens [B, G, D]."""
    return feature_map.permute(0, 2, 3, 1).flatten(1, 2)


class BottleneckConv(nn.Module):
    """A 3 x 3 or 1 x 1 convolution to the head width, batch norm, ReLU, and a linear layer back (method: conv3, conv1).

    Prefix tokens pass unchanged (rule `identity`). Takes the arguments of the attention layer it replaces and ignores
    all but the tokens; with `returns_tuple` it answers `(output, None)`, as Hugging Face's attention does.
    """

    def __init__(
        self,
        weights: BottleneckWeights,
        batchnorm: nn.BatchNorm2d,
        prefix_tokens: int,
        grid: Grid,
        returns_tuple: bool,
    ) -> None:
        super().__init__()
        width, dim = weights.in_weight.shape[:2]
        like = {"device": weights.in_weight.device, "dtype": weights.in_weight.dtype}
        self.conv_in: nn.Conv2d | nn.Linear
        if weights.in_weight.dim() == 4:
            self.conv_in = nn.utils.skip_init(nn.Conv2d, dim, width, 3, padding=1, **like)
        else:
            self.conv_in = nn.utils.skip_init(nn.Linear, dim, width, **like)
        self.bn: nn.Module = batchnorm
        self.act = nn.ReLU()
        self.conv_out = nn.utils.skip_init(nn.Linear, width, dim, **like)
        self.prefix_tokens = prefix_tokens
        self.grid = grid
        self.returns_tuple = returns_tuple
        with torch.no_grad():
            _bias(self.conv_in).copy_(weights.in_bias)
            _bias(self.conv_out).copy_(weights.out_bias)
            self.conv_in.weight.copy_(weights.in_weight)
            self.conv_out.weight.copy_(weights.out_weight)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x: [B, N, D], normalised. Returns [B, N, D]."""
        size = self.grid.size(x, self.prefix_tokens)
        tokens = x[:, self.prefix_tokens :]  # [B, G, D]
        if isinstance(self.conv_in, nn.Conv2d):
            hidden = self.conv_in(as_map(tokens, size))  # [B, E, height, width]
        else:
            hidden = as_map(self.conv_in(tokens), size)
        hidden = self.act(self.bn(hidden))
        out = self.conv_out(as_tokens(hidden))  # [B, G, D]
        if self.prefix_tokens:
            out = torch.cat([x[:, : self.prefix_tokens].to(out.dtype), out], dim=1)
        return (out, None) if self.returns_tuple else out

    def fold_batchnorm(self) -> None:
        """Fold the batch norm into the first layer, in place. The output in evaluation mode stays the same."""
        if not isinstance(self.bn, nn.BatchNorm2d):
            return
        with torch.no_grad():
            weight, bias = fold_batchnorm(self.conv_in.weight, _bias(self.conv_in), self.bn)
            self.conv_in.weight.copy_(weight)
            _bias(self.conv_in).copy_(bias)
        self.bn = nn.Identity().train(self.training)


class Skip(nn.Module):
    """Nothing in place of an attention layer: adds zero, or the normalised input under the published rule."""

    def __init__(self, rule: str, returns_tuple: bool) -> None:
        super().__init__()
        self.rule = rule
        self.returns_tuple = returns_tuple

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x: [B, N, D]. Returns [B, N, D]."""
        out = torch.zeros_like(x) if self.rule == "zero" else x
        return (out, None) if self.returns_tuple else out

    def extra_repr(self) -> str:
        """Show the rule in the module's printed form."""
        return f"rule={self.rule!r}"


def narrow_linear(linear: nn.Linear, units: Tensor, axis: int) -> nn.Linear:
    """Return a copy of a linear layer with only these outputs (axis 0) or inputs (axis 1). units: [kept], indices."""
    weight = linear.weight.detach().index_select(axis, units)
    bias = linear.bias
    narrow = nn.utils.skip_init(
        nn.Linear,
        weight.shape[1],
        weight.shape[0],
        bias=bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    with torch.no_grad():
        narrow.weight.copy_(weight)
        if bias is not None:
            narrow.bias.copy_(bias.index_select(0, units) if axis == 0 else bias)
    narrow.weight.requires_grad_(linear.weight.requires_grad)
    if bias is not None:
        narrow.bias.requires_grad_(bias.requires_grad)
    return narrow.train(linear.training)


def _bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    assert layer.bias is not None
    return layer.bias
