"""What replaces an attention layer: a bottleneck convolution, narrower attention or nothing. Stock layers inside.

Shapes: B batch, N tokens = P prefix tokens + G grid tokens (height x width, row-major), D width, E hidden width,
H heads, R query/key dimensions and V value dimensions a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spvit.kernels import BottleneckWeights, NarrowWeights, Projections, fold_batchnorm


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

    Prefix tokens go through `prefix`, which is an identity under the rule of that name. Takes the arguments of the
    attention layer it replaces and ignores all but the tokens; with `returns_tuple` it answers `(output, None)`, as
    Hugging Face's attention does.
    """

    def __init__(
        self,
        weights: BottleneckWeights,
        batchnorm: nn.BatchNorm2d,
        prefix_tokens: int,
        grid: Grid,
        returns_tuple: bool,
        prefix_rule: str = "identity",
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
        self.prefix = _prefix_layer(prefix_rule if prefix_tokens else "identity", prefix_tokens, width, dim, like)
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
            out = torch.cat([self.prefix(x[:, : self.prefix_tokens]).to(out.dtype), out], dim=1)
        return (out, None) if self.returns_tuple else out

    @torch.no_grad()
    def set_linear(
        self, inward: Tensor, mean: Tensor, variance: Tensor, outward: Tensor, out_mean: Tensor, margin: float
    ) -> None:
        """Make the layer the linear map `outward (inward x - mean) + out_mean` wherever ReLU lets it, in place.

        Batch norm moves the hidden activations so many standard deviations above zero; the output bias moves back.

        Args:
            inward: [E, D] or, for a 3 x 3 convolution, [E, 9 D] with the nine positions of a channel side by side.
            mean: of `inward x`, [E].
            variance: of `inward x`, [E].
            outward: [D, E].
            out_mean: [D].
            margin: standard deviations.
        """
        assert isinstance(self.bn, nn.BatchNorm2d)
        spread = torch.sqrt(variance + self.bn.eps)
        self.conv_in.weight.copy_(inward.view_as(self.conv_in.weight))
        _bias(self.conv_in).zero_()
        for own, value in (
            (self.bn.running_mean, mean),
            (self.bn.running_var, variance),
            (self.bn.weight, torch.ones_like(mean)),
            (self.bn.bias, torch.full_like(mean, margin)),
            (self.conv_out.weight, outward * spread),
            (_bias(self.conv_out), out_mean - outward @ (spread * margin)),
        ):
            assert own is not None
            own.copy_(value)

    def fold_batchnorm(self) -> None:
        """Fold the batch norm into the first layer, in place. The output in evaluation mode stays the same."""
        if not isinstance(self.bn, nn.BatchNorm2d):
            return
        with torch.no_grad():
            weight, bias = fold_batchnorm(self.conv_in.weight, _bias(self.conv_in), self.bn)
            self.conv_in.weight.copy_(weight)
            _bias(self.conv_in).copy_(bias)
        self.bn = nn.Identity().train(self.training)


class Constant(nn.Module):
    """A learned vector for each of some first tokens and, if there is one more, that one for all other tokens."""

    def __init__(self, vectors: int, dim: int, like: dict[str, Any]) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vectors, dim, **like))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, D], of which only the shape counts. Returns [B, N, D]."""
        index = torch.arange(x.shape[1], device=x.device).clamp(max=len(self.bias) - 1)
        return self.bias[index].expand(len(x), -1, -1)


def _prefix_layer(rule: str, tokens: int, width: int, dim: int, like: dict[str, Any]) -> nn.Module:
    if rule == "mean":
        return Constant(tokens, dim, like)
    if rule == "linear":
        second = nn.Linear(width, dim, **like)
        for parameter in second.parameters():
            nn.init.zeros_(parameter)  # adds nothing until it is repaired or trained, as the mean does
        return nn.Sequential(nn.Linear(dim, width, **like), second)
    return nn.Identity()


class Skip(nn.Module):
    """Nothing in place of an attention layer: adds what the architecture's `skip_rule` says.

    `zero`; `normalised_input`, as the published checkpoints do; or `mean`, constant vectors.
    """

    def __init__(self, rule: str, returns_tuple: bool, mean: Constant | None = None) -> None:
        super().__init__()
        self.rule = rule
        self.returns_tuple = returns_tuple
        self.mean = mean

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x: [B, N, D]. Returns [B, N, D]."""
        if self.mean is not None:
            x = self.mean(x)
        elif self.rule == "zero":
            x = torch.zeros_like(x)
        return (x, None) if self.returns_tuple else x

    def extra_repr(self) -> str:
        """Show the rule in the module's printed form."""
        return f"rule={self.rule!r}"


class NarrowAttention(nn.Module):
    """Attention with fewer heads or dimensions than the layer it replaces: one packed projection, fused attention.

    Takes the arguments of that layer; a mask is added to the logits. The softmax keeps the original layer's scale.
    """

    def __init__(self, weights: NarrowWeights, layer: Projections, returns_tuple: bool) -> None:
        super().__init__()
        heads, rank, dim = weights.query_weight.shape
        value_rank = weights.value_weight.shape[1]
        like: dict[str, Any] = {"device": weights.query_weight.device, "dtype": weights.query_weight.dtype}
        self.heads, self.query_key_rank, self.value_rank = heads, rank, value_rank
        self.scale, self.dropout = layer.scale, layer.dropout
        self.returns_tuple = returns_tuple
        biased = weights.value_bias is not None
        out_biased = weights.out_bias is not None
        self.qkv = nn.utils.skip_init(nn.Linear, dim, heads * (2 * rank + value_rank), bias=biased, **like)
        self.query_norm = layer.query_norm if layer.query_norm is not None else nn.Identity()
        self.key_norm = layer.key_norm if layer.key_norm is not None else nn.Identity()
        self.out_norm = layer.out_norm if layer.out_norm is not None else nn.Identity()
        self.proj = nn.utils.skip_init(nn.Linear, heads * value_rank, dim, bias=out_biased, **like)
        self.out_drop = nn.Dropout(layer.out_dropout)
        self.load(weights)

    @torch.no_grad()
    def load(self, weights: NarrowWeights) -> None:
        """Take over weights of the layer's own shapes, in place."""
        parts = (weights.query_weight, weights.key_weight, weights.value_weight)
        self.qkv.weight.copy_(torch.cat([part.flatten(0, 1) for part in parts]))
        self.proj.weight.copy_(weights.out_weight.flatten(1))
        biases = (weights.query_bias, weights.key_bias, weights.value_bias)
        given = [bias.flatten() for bias in biases if bias is not None]
        if given:
            self.qkv.bias.copy_(torch.cat(given))
        if weights.out_bias is not None:
            self.proj.bias.copy_(weights.out_bias)

    def heads_out(self, x: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the outputs of all heads side by side, [B, N, H V], which the output projection takes."""
        sizes = [self.heads * self.query_key_rank] * 2 + [self.heads * self.value_rank]
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).split(sizes, dim=2)
        )  # [B, H, N, R], twice, and [B, H, N, V]
        query, key = self.query_norm(query), self.key_norm(key)
        if x.device.type == "cpu" and self.query_key_rank != self.value_rank:
            # The CPU's fused attention wants equal widths; what is filled up with zeros changes nothing.
            width = max(self.query_key_rank, self.value_rank)
            query, key, value = (F.pad(part, (0, width - part.shape[-1])) for part in (query, key, value))
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=self.scale,
        )
        return self.out_norm(out[..., : self.value_rank].transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **kwargs: Any) -> Any:
        """x: [B, N, D]. Returns [B, N, D]."""
        out = self.out_drop(self.proj(self.heads_out(x, attn_mask, is_causal)))
        return (out, None) if self.returns_tuple else out

    def extra_repr(self) -> str:
        """Show heads and dimensions in the module's printed form."""
        return f"heads={self.heads}, query_key_rank={self.query_key_rank}, value_rank={self.value_rank}"


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
