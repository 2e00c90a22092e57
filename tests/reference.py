"""The method as its specification (method.md) states it, in explicit loops: slow, and independent of spvit's code.

Section numbers are those of the specification. Shapes: B batch, N tokens, d width, h heads, e head width, P prefix.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Projection:
    """One linear map of an attention layer: weight [d, d] and bias [d] or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        out = x @ self.weight.T
        return out if self.bias is None else out + self.bias


def projections(attention: Any) -> tuple[int, list[Projection]]:
    """Return the number of heads and the q, k, v and o projections of a timm or Hugging Face attention layer."""
    if hasattr(attention, "qkv"):
        biases = [None] * 3 if attention.qkv.bias is None else attention.qkv.bias.chunk(3)
        packed = [Projection(weight, bias) for weight, bias in zip(attention.qkv.weight.chunk(3), biases)]
        return attention.num_heads, [*packed, Projection(attention.proj.weight, attention.proj.bias)]
    layers = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return attention.num_attention_heads, [Projection(layer.weight, layer.bias) for layer in layers]


def msa(x: Tensor, heads: int, q: Projection, k: Projection, v: Projection, o: Projection) -> Tensor:
    """Plain multi-head self-attention, a head and an image at a time."""
    width = len(v.weight) // heads
    images = []
    for image in x:
        queries, keys, values = q(image), k(image), v(image)
        outputs = []
        for i in range(heads):
            rows = slice(i * width, (i + 1) * width)
            scores = queries[:, rows] @ keys[:, rows].T / width**0.5
            outputs.append(torch.softmax(scores, dim=-1) @ values[:, rows])
        images.append(o(torch.cat(outputs, dim=-1)))
    return torch.stack(images)


def window_places(grid: Any) -> list[list[int | None]]:
    """Return, a window and a token of it, which row-major token of the map stands there; None for padding (Swin)."""
    height, width = grid.height, grid.width
    places = []
    for top in range(0, height, grid.window[0]):
        for left in range(0, width, grid.window[1]):
            window: list[int | None] = []
            for row in range(top, top + grid.window[0]):
                for column in range(left, left + grid.window[1]):
                    inside = row < height and column < width
                    shifted = ((row + grid.shift[0]) % height) * width + (column + grid.shift[1]) % width
                    window.append(shifted if inside else None)
            places.append(window)
    return places


def windows_to_map(x: Tensor, grid: Any) -> Tensor:
    """Return the tokens [B, G, d] of maps that are cut into windows, x [B windows, w^2, d]."""
    places = window_places(grid)
    found: dict[int, tuple[int, int]] = {}
    for window, tokens in enumerate(places):
        found |= {place: (window, index) for index, place in enumerate(tokens) if place is not None}
    images = x.unflatten(0, (-1, len(places)))
    return torch.stack([images[:, found[place][0], found[place][1]] for place in range(len(found))], dim=1)


def map_to_windows(tokens: Tensor, grid: Any) -> Tensor:
    """Return windows [B windows, w^2, d] of the tokens [B, G, d] of maps; zeros where padding is."""
    nothing = torch.zeros_like(tokens[:, 0])
    windows = [
        torch.stack([nothing if place is None else tokens[:, place] for place in window], dim=1)
        for window in window_places(grid)
    ]
    return torch.stack(windows, dim=1).flatten(0, 1)


@functools.cache
def relative_index(rows: int, columns: int) -> Tensor:
    """Return which row of the bias table stands between any two tokens of a window (Swin)."""
    index = torch.zeros(rows * columns, rows * columns, dtype=torch.long)
    for a in range(rows * columns):
        for b in range(rows * columns):
            down, across = a // columns - b // columns, a % columns - b % columns
            index[a, b] = (down + rows - 1) * (2 * columns - 1) + across + columns - 1
    return index


def window_msa(x: Tensor, attention: Any, mask: Tensor | None) -> Tensor:
    """Self-attention of windows, one at a time: relative position bias and mask added to the scores (Swin)."""
    heads, (q, k, v, o) = projections(attention)
    width = len(v.weight) // heads
    index = relative_index(*attention.window_size)
    windows = []
    for number, window in enumerate(x):
        queries, keys, values = q(window), k(window), v(window)
        outputs = []
        for i in range(heads):
            own = slice(i * width, (i + 1) * width)
            scores = queries[:, own] @ keys[:, own].T / width**0.5
            scores = scores + attention.relative_position_bias_table[index, i]
            if mask is not None:
                scores = scores + mask[number % len(mask)]
            outputs.append(torch.softmax(scores, dim=-1) @ values[:, own])
        windows.append(o(torch.cat(outputs, dim=-1)))
    return torch.stack(windows)


def batch_norm(h: Tensor, bn: nn.BatchNorm2d, training: bool) -> Tensor:
    """Batch norm over batch and grid, h [B, G, e]; eps 1e-5, momentum 0.1 (section 1). Updates running statistics."""
    if not training:
        return (h - bn.running_mean) / torch.sqrt(bn.running_var + 1e-5) * bn.weight + bn.bias
    count = h.shape[0] * h.shape[1]
    mean = h.sum((0, 1)) / count
    variance = ((h - mean) ** 2).sum((0, 1)) / count
    with torch.no_grad():
        bn.running_mean.copy_(0.9 * bn.running_mean + 0.1 * mean)
        bn.running_var.copy_(0.9 * bn.running_var + 0.1 * variance * count / (count - 1))
    return (h - mean) / torch.sqrt(variance + 1e-5) * bn.weight + bn.bias


def bottleneck(x: Tensor, layer: Any, bn: nn.BatchNorm2d, positions: list[int], training: bool) -> Tensor:
    """conv3 (nine positions) or conv1 (the centre, position 4) of section 1."""
    heads, (_, _, v, o) = projections(layer.attention)
    width = len(v.weight) // heads
    height, columns = layer.grid.height, layer.grid.width
    exponentials = torch.exp((layer.head_logits - layer.head_logits.max()) / layer.temperature)
    mixed: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for p in positions:
        shares = exponentials[:, p] / exponentials[:, p].sum()
        kernel, bias, out = 0, x.new_zeros(width), 0
        for i in range(heads):
            rows = slice(i * width, (i + 1) * width)
            kernel = kernel + shares[i] * v.weight[rows]
            out = out + shares[i] * o.weight[:, rows]
            if v.bias is not None:
                bias = bias + shares[i] * v.bias[rows]
        mixed[p] = (kernel, bias, out)
    tokens = x[:, layer.site.prefix_tokens :]
    hidden = []
    for row in range(height):
        for column in range(columns):
            total = sum(mixed[p][1] for p in positions).expand(len(x), -1)
            for p in positions:
                r, c = row + p % 3 - 1, column + p // 3 - 1
                if 0 <= r < height and 0 <= c < columns:
                    total = total + tokens[:, r * columns + c] @ mixed[p][0].T
            hidden.append(total)
    activated = batch_norm(torch.stack(hidden, dim=1), bn, training).clamp(min=0)
    out = activated @ sum(mixed[p][2] for p in positions).T
    if o.bias is not None:
        out = out + o.bias
    return torch.cat([x[:, : layer.site.prefix_tokens], out], dim=1)


def sample(logits: Tensor, uniforms: Tensor | None) -> Tensor:
    """b of section 2: sampled in training, with straight-through gradients; thresholded in evaluation (no uniforms)."""
    p = torch.sigmoid(logits)
    if uniforms is None:
        return (p > 0.5).to(p.dtype)
    odds = torch.log(uniforms / (1 - uniforms)) + torch.log(p / (1 - p))
    soft = torch.sigmoid(odds)
    return (odds > 0).to(p.dtype) + soft - soft.detach()


def nested(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c1, c2, c3 of section 2, with its two detachments."""
    c1, c2, c3 = b[0], b[0] * b[1], b[0] * b[1] * b[2]
    first, second, third = (round(c.item()) for c in (c1, c2, c3))
    if first and second:
        c1 = c1.detach()
    if first and second and third:
        c2 = c2.detach()
    return c1, c2, c3


def attention_forward(layer: Any, uniforms: Tensor | None, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The whole of section 2 for one layer: every candidate with gradients, then the formula."""
    training = uniforms is not None
    heads, maps = projections(layer.attention)
    windowed = hasattr(layer.attention, "relative_position_bias_table")
    grid_tokens = windows_to_map(x, layer.grid) if windowed else x
    three = bottleneck(grid_tokens, layer, layer.bn3, list(range(9)), training)
    one = bottleneck(grid_tokens, layer, layer.bn1, [4], training)
    if windowed:
        three, one = map_to_windows(three, layer.grid), map_to_windows(one, layer.grid)
    c1, c2, c3 = nested(sample(layer.gate_logits, uniforms))
    attended = window_msa(x, layer.attention, *args, **kwargs) if windowed else msa(x, heads, *maps)
    out = c3 * attended + c2 * (1 - c3) * three + c1 * (1 - c2) * (1 - c3) * one
    return out if hasattr(layer.attention, "qkv") else (out, None)


def gated_linear_forward(layer: Any, uniforms: Tensor | None, hidden: Tensor) -> Tensor:
    """Section 3, from the activations on: W2 (b * hidden) + b2."""
    out = (sample(layer.gate_logits, uniforms) * hidden) @ layer.linear.weight.T
    return out if layer.linear.bias is None else out + layer.linear.bias


def install(net: nn.Module, uniforms: Tensor | None) -> nn.Module:
    """Make every gated layer of a network (or a lone layer) compute by this file, in place. uniforms: one a gate."""
    for layer in net.modules():
        if not hasattr(layer, "gate_logits"):
            continue
        own = None
        if uniforms is not None:
            own, uniforms = uniforms[: len(layer.gate_logits)], uniforms[len(layer.gate_logits) :]
        forward = attention_forward if hasattr(layer, "head_logits") else gated_linear_forward
        layer.forward = lambda *a, _f=forward, _l=layer, _u=own, **k: _f(_l, _u, *a, **k)
    return net


def uniforms_for(logits: Tensor, bits: list[bool]) -> Tensor:
    """Return uniforms with which gates of these logits are sampled as these bits."""
    closed_below = torch.sigmoid(-logits.detach())
    open_ = torch.tensor(bits)
    return torch.where(open_, (1 + closed_below) / 2, closed_below / 2)


def expected_gate(logit: Tensor) -> Tensor:
    """c^ of section 4: 1[p > 0.5] in value, the gradient of sigmoid(p - 0.5)."""
    p = torch.sigmoid(logit)
    soft = torch.sigmoid(p - 0.5)
    return (p > 0.5).to(p.dtype) + soft - soft.detach()


def expected_cost(
    attention: list[Tensor], ffn: list[Tensor], fixed: float, msa: int, conv3: int, conv1: int, unit: int
) -> Tensor:
    """The cost of section 4 for blocks that are all alike, from gate logits [3] and [units] a block."""
    total = torch.tensor(float(fixed), dtype=attention[0].dtype)
    for gates, units in zip(attention, ffn):
        b1, b2, b3 = expected_gate(gates)
        c1, c2, c3 = b1, b1 * b2, b1 * b2 * b3  # multiplied as in section 2, but nothing is detached: golden agrees
        total = total + c1 * conv1 + c2 * (conv3 - conv1) + c3 * (msa - conv3) + unit * expected_gate(units).sum()
    return total


# What a repaired layer is fitted to, from the modules of a dense block, run one by one. x, stream: [B, N, d].

SMALLEST_SCALE = 1e-4


def post_norm(block: Any) -> bool:
    """Whether a block norms what its layers answer (timm's ResPostBlock)."""
    return type(block).__name__ == "ResPostBlock"


def attention_answer(block: Any, x: Tensor, grid: Any = None) -> Tensor:
    """Return what a block's attention answers to the block's input; Swin's in windows, from a map [B, h, w, d]."""
    if hasattr(block, "layernorm_before"):
        answer: Tensor = block.attention(block.layernorm_before(x))[0]
        return answer
    if grid is not None:
        return block.attn(map_to_windows(block.norm1(x).flatten(1, 2), grid), mask=block.attn_mask)
    return block.attn(x if post_norm(block) else block.norm1(x))


def ffn_answer(block: Any, stream: Tensor) -> Tensor:
    """Return what a block's FFN answers to the stream behind attention."""
    if post_norm(block):
        return block.mlp(stream)
    return block.mlp((block.layernorm_after if hasattr(block, "layernorm_after") else block.norm2)(stream))


def per_scale(missing: Tensor, block: Any, name: str) -> Tensor:
    """Return what a stream misses over the scale of a layer that is to bring it, damped; 0 behind a norm."""
    if post_norm(block):
        return 0 * missing
    scale = getattr(getattr(block, name, None), "gamma", torch.ones_like(missing[0, 0]))
    return missing * scale / (scale**2 + SMALLEST_SCALE * (scale**2).mean())


def attention_target(block: Any, dense_x: Tensor, x: Tensor, grid: Any = None) -> tuple[Tensor, Tensor]:
    """Return what the dense attention would answer here, and what that misses of bringing the stream back.

    From the inputs of the dense and of the pruned block.
    """
    missing = per_scale(dense_x - x, block, "ls1")
    if grid is not None:
        missing = map_to_windows(missing.flatten(1, 2), grid)
    own, dense = (attention_answer(block, stream, grid) for stream in (x, dense_x))
    return own, 0 * missing if post_norm(block) else dense - own + missing


def ffn_target(block: Any, dense_stream: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same of an FFN, from the streams behind the attention of the dense and of the pruned block."""
    missing = per_scale(dense_stream - stream, block, "ls2")
    own, dense = ffn_answer(block, stream), ffn_answer(block, dense_stream)
    return own, 0 * missing if post_norm(block) else dense - own + missing


def mended_target(x: Tensor, own: Tensor, missing: Tensor, biased: bool = True, windows: int = 1) -> Tensor:
    """Return own + what inputs x [B, N, x] predict of what is missing, as far as that holds on the other images.

    windows: of an image, one after the other.
    """
    if not missing.any():
        return own
    images = len(x) // windows
    cut, ridge = (images + 1) // 2 * windows, 0.04 * x.shape[-1] / images
    parts = [flat(x[:cut], missing[:cut]), flat(x[cut:], missing[cut:])]
    alike = power = x.new_zeros(missing.shape[-1], dtype=torch.float64)
    for (fitted_x, fitted_y), (held_x, held_y) in (parts, parts[::-1]):
        weight, bias = ridge_fit(fitted_x, fitted_y, ridge, biased)
        centre = fitted_y.mean(0) if biased else 0
        predicted = held_x @ weight.T + bias * biased - centre
        alike, power = alike + (predicted * (held_y - centre)).sum(0), power + predicted.square().sum(0)
    size = flat(missing)[0].square().sum(0).clamp(min=1e-30)
    half = float(((alike / size).sum() / (power / size).sum()).clamp(0, 1))
    weight, bias = ridge_fit(*flat(x, missing), ridge, biased)
    if not biased:
        return own + 2 * half / (1 + half) * x @ weight.T
    centre = flat(missing)[0].mean(0)
    return own + centre + 2 * half / (1 + half) * (x @ weight.T + bias - centre)


# Closed-form repair from whole matrices of activations, in float64. Shapes: n tokens, x inputs, y outputs.


def flat(*tensors: Tensor) -> list[Tensor]:
    """Return [n, width] float64 matrices."""
    return [tensor.detach().double().reshape(-1, tensor.shape[-1]) for tensor in tensors]


def penalty(x: Tensor, ridge: float, centred: bool = True) -> float:
    """Return what the ridge adds to the diagonal: relative to the mean variance (or second moment) of the inputs."""
    x = x - x.mean(0) if centred else x
    return ridge * float((x * x).mean())


def ridge_fit(x: Tensor, y: Tensor, ridge: float, biased: bool = True) -> tuple[Tensor, Tensor]:
    """Return weight [y, x] and bias [y] of the ridge regression of y on x; the bias is not penalised."""
    mean_x, mean_y = (x.mean(0), y.mean(0)) if biased else (x.new_zeros(x.shape[1]), y.new_zeros(y.shape[1]))
    xc, yc = x - mean_x, y - mean_y
    level = penalty(x, ridge, biased)
    covariance = xc.T @ xc / len(x) + (level if level > 0 else 1.0) * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(covariance, xc.T @ yc / len(x)).T
    return weight, mean_y - weight @ mean_x


def ridge_loss(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, level: float, prior: Tensor | float = 0.0) -> float:
    """Return the mean squared error plus the penalty on the weight's distance from a prior."""
    return float((x @ weight.T + bias - y).square().sum() / len(x) + level * (weight - prior).square().sum())


def low_rank_ridge_fit(x: Tensor, y: Tensor, ridge: float, rank: int) -> tuple[Tensor, Tensor]:
    """Return weight [y, x] of a rank and bias [y]: reduced-rank regression on the data with the ridge's rows added."""
    xc, yc = x - x.mean(0), y - y.mean(0)
    rows = torch.eye(x.shape[1], dtype=x.dtype) * (len(x) * penalty(x, ridge)) ** 0.5
    xa, ya = torch.cat([xc, rows]), torch.cat([yc, yc.new_zeros(x.shape[1], y.shape[1])])
    full = torch.linalg.lstsq(xa, ya).solution  # [x, y]
    right = torch.linalg.svd(xa @ full, full_matrices=False).Vh[:rank]
    weight = (full @ right.T @ right).T
    return weight, y.mean(0) - weight @ x.mean(0)


def im2col(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return [B, G, 9 d] from grid tokens [B, G, d]: a channel's nine neighbours, row by row, zero outside."""
    height, width = grid
    columns = tokens.new_zeros(*tokens.shape, 9)
    for row in range(height):
        for column in range(width):
            for place in range(9):
                r, c = row + place // 3 - 1, column + place % 3 - 1
                if 0 <= r < height and 0 <= c < width:
                    columns[:, row * width + column, :, place] = tokens[:, r * width + c]
    return columns.flatten(2)


def heads_out(x: Tensor, layer: Any, mask: Tensor | None = None) -> Tensor:
    """Return the outputs of narrow attention's heads [B, N, H, V], from weights by head, a head at a time.

    layer: query_weight, key_weight [H, R, d], value_weight [H, V, d], biases or None, and scale.
    """
    outputs = []
    for head in range(len(layer.query_weight)):
        parts = []
        for name in ("query", "key", "value"):
            weight, bias = getattr(layer, f"{name}_weight"), getattr(layer, f"{name}_bias")
            part = x @ weight[head].T
            parts.append(part if bias is None else part + bias[head])
        query, key, value = parts
        scores = layer.scale * query @ key.transpose(1, 2)
        outputs.append(torch.softmax(scores if mask is None else scores + mask, dim=-1) @ value)
    return torch.stack(outputs, dim=2)
