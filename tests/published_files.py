"""Checkpoints as others publish them, from random weights, and naive forward passes that read those very keys.

Kinds a block: `dense` (qkv as pre-trained), `msa`, `conv3`, `conv1`, `skip` (fine-tuned, unfolded), `folded3`,
`folded1` (fine-tuned, folded). Swin files are as the published code writes them: merging at the end of a stage, stored
buffers, kernel positions centre-first.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace as Namespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import reference
from spvit.architecture import Architecture, Attention
from spvit.cost import count_params
from spvit.hosts.host import Host
from spvit.replacements.costs import network_costs
from spvit.replacements.kernels import POSITIONS
from tiny import CLASSES

WIDTH, MLP = 24, 72
DEIT = {"img_size": 64, "embed_dim": WIDTH, "depth": 4, "num_heads": 3, "mlp_ratio": 3}
SWIN = {
    "img_size": 28, "patch_size": 2, "window_size": 7, "embed_dim": WIDTH, "depths": (2, 2), "num_heads": (3, 4),
    "mlp_ratio": 3,
}  # fmt: skip
SWIN_PREFIXES = [f"layers.{i}.blocks.{j}" for i in range(2) for j in range(2)]
SWIN_ORDER = [4, 0, 1, 2, 3, 5, 6, 7, 8]  # which kernel position each column of head_probs has


class Writer:
    """Collects random tensors by name."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.state: dict[str, Tensor] = {}

    def add(self, name: str, *shape: int, spread: float | None = None, around: float = 0.0) -> None:
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else 4
        noise = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)
        self.state[name] = around + noise * (fan_in**-0.5 if spread is None else spread)

    def linear(self, name: str, inputs: int, outputs: int) -> None:
        self.add(f"{name}.weight", outputs, inputs)
        self.add(f"{name}.bias", outputs)

    def norm(self, name: str, width: int) -> None:
        self.add(f"{name}.weight", width, around=1.0)
        self.add(f"{name}.bias", width)

    def batch_norm(self, name: str, width: int) -> None:
        self.norm(name, width)
        self.add(f"{name}.running_mean", width)
        self.state[f"{name}.running_var"] = 0.5 + torch.rand(width, generator=self.generator, dtype=self.dtype)
        self.state[f"{name}.num_batches_tracked"] = torch.tensor(17)

    def attention(self, name: str, kind: str, width: int, heads: int, spread: float, window: int = 0) -> None:
        head = width // heads
        if kind.startswith("folded"):
            size = int(kind[-1])
            self.add(f"{name}.bconv.0.weight", head, width, size, size)
            self.add(f"{name}.bconv.0.bias", head)
            self.batch_norm(f"{name}.bconv.1", head)
            self.add(f"{name}.bconv.3.weight", width, head, 1, 1)
            self.add(f"{name}.bconv.3.bias", width)
            return
        if kind == "skip":
            return
        if kind == "dense":
            self.linear(f"{name}.qkv", width, 3 * width)
        else:
            self.linear(f"{name}.v", width, width)
        if kind == "msa":
            self.linear(f"{name}.qk", width, 2 * width)
        self.linear(f"{name}.proj", width, width)
        if kind in ("conv3", "conv1"):
            self.add(f"{name}.head_probs", heads, 9, spread=spread, around=1.0)
            self.batch_norm(f"{name}.bn_{kind[-1]}x{kind[-1]}", head)
        elif window:
            self.add(f"{name}.relative_position_bias_table", (2 * window - 1) ** 2, heads)
            self.state[f"{name}.relative_position_index"] = torch.zeros(window**2, window**2, dtype=torch.long)

    def block(self, name: str, kind: str, width: int, heads: int, units: int, spread: float, window: int = 0) -> None:
        self.norm(f"{name}.norm1", width)
        self.attention(f"{name}.attn", kind, width, heads, spread, window)
        self.norm(f"{name}.norm2", width)
        self.linear(f"{name}.mlp.fc1", width, units)
        self.linear(f"{name}.mlp.fc2", units, width)


def deit_state(
    kinds: Sequence[str], units: Sequence[int] = (MLP,) * 4, *, distilled: bool = False, dtype: Any = torch.float64
) -> dict[str, Tensor]:
    """Return the weights of a micro DeiT."""
    file = Writer(3, dtype)
    file.add("cls_token", 1, 1, WIDTH, spread=1.0)
    if distilled:
        file.add("dist_token", 1, 1, WIDTH, spread=1.0)
        file.linear("head_dist", WIDTH, CLASSES)
    file.add("pos_embed", 1, 17 + distilled, WIDTH, spread=0.5)
    file.add("patch_embed.proj.weight", WIDTH, 3, 16, 16)
    file.add("patch_embed.proj.bias", WIDTH)
    for index, (kind, count) in enumerate(zip(kinds, units, strict=True)):
        file.block(f"blocks.{index}", kind, WIDTH, 3, count, spread=0.01)
    file.norm("norm", WIDTH)
    file.linear("head", WIDTH, CLASSES)
    return file.state


def swin_state(
    kinds: Sequence[str], units: Sequence[int] = (MLP, MLP, 2 * MLP, 2 * MLP), dtype: Any = torch.float64
) -> dict[str, Tensor]:
    """Return the weights of a micro Swin."""
    file = Writer(4, dtype)
    file.add("patch_embed.proj.weight", WIDTH, 3, 2, 2)
    file.add("patch_embed.proj.bias", WIDTH)
    file.norm("patch_embed.norm", WIDTH)
    for index, (kind, count) in enumerate(zip(kinds, units, strict=True)):
        stage = index // 2
        width, heads = WIDTH * 2**stage, (3, 4)[stage]
        file.block(SWIN_PREFIXES[index], kind, width, heads, count, spread=50.0, window=7)
    file.state["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
    file.norm("layers.0.downsample.norm", 4 * WIDTH)
    file.add("layers.0.downsample.reduction.weight", 2 * WIDTH, 4 * WIDTH)
    file.norm("norm", 2 * WIDTH)
    file.linear("head", 2 * WIDTH, CLASSES)
    return file.state


def deit_logits(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return the logits of a DeiT file for images x [B, 3, height, width], head by head and token by token."""
    w = state.__getitem__
    tokens = F.conv2d(x, w("patch_embed.proj.weight"), w("patch_embed.proj.bias"), stride=16)
    height, width = tokens.shape[2:]
    prefix = [w(name).expand(len(x), -1, -1) for name in ("cls_token", "dist_token") if name in state]
    z = torch.cat([*prefix, tokens.flatten(2).transpose(1, 2)], dim=1) + w("pos_embed")
    grid = Namespace(height=height, width=width)
    for index in range(sum(key.endswith("norm1.weight") for key in state)):
        name = f"blocks.{index}"
        head_probs = state.get(f"{name}.attn.head_probs")
        normalised = _norm(state, f"{name}.norm1", z, 1e-6)
        z = z + _attention(state, f"{name}.attn", normalised, 3, grid, len(prefix), head_probs, 0.01)
        z = z + _ffn(state, f"{name}.mlp", _norm(state, f"{name}.norm2", z, 1e-6))
    z = _norm(state, "norm", z, 1e-6)
    out = F.linear(z[:, 0], w("head.weight"), w("head.bias"))
    if "dist_token" in state:
        out = (out + F.linear(z[:, 1], w("head_dist.weight"), w("head_dist.bias"))) / 2
    return out


def swin_logits(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return the logits of a Swin file for images x [B, 3, height, width]; convolutions act on the whole map."""
    w = state.__getitem__
    planes = F.conv2d(x, w("patch_embed.proj.weight"), w("patch_embed.proj.bias"), stride=2)
    size = planes.shape[2]
    z = _norm(state, "patch_embed.norm", planes.flatten(2).transpose(1, 2), 1e-5)
    for index, name in enumerate(SWIN_PREFIXES):
        shift = 3 if index % 2 and size > 7 else 0
        grid = Namespace(height=size, width=size, window=(7, 7), shift=(shift, shift))
        head_probs = None
        if f"{name}.attn.head_probs" in state:
            stored = w(f"{name}.attn.head_probs")
            head_probs = torch.stack([stored[:, SWIN_ORDER.index(p)] for p in range(9)], dim=1)
        normalised = _norm(state, f"{name}.norm1", z, 1e-5)
        z = z + _attention(state, f"{name}.attn", normalised, (3, 4)[index // 2], grid, 0, head_probs, 100.0)
        z = z + _ffn(state, f"{name}.mlp", _norm(state, f"{name}.norm2", z, 1e-5))
        if index == 1:
            maps = z.unflatten(1, (size, size))
            parts = [maps[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
            merged = _norm(state, "layers.0.downsample.norm", torch.cat(parts, dim=-1).flatten(1, 2), 1e-5)
            z = F.linear(merged, w("layers.0.downsample.reduction.weight"))
            size //= 2
    return F.linear(_norm(state, "norm", z, 1e-5).mean(1), w("head.weight"), w("head.bias"))


def _attention(
    state: dict[str, Tensor], name: str, z: Tensor, heads: int, grid: Any, prefix: int, probs: Any, alpha: float
) -> Tensor:
    """z: [B, N, D], normalised. Returns [B, N, D]."""
    part = {key[len(name) + 1 :]: value for key, value in state.items() if key.startswith(f"{name}.")}
    if not part:
        return z  # what the published fine-tuning calls skip
    if "bconv.0.weight" in part:
        planes = z[:, prefix:].unflatten(1, (grid.height, grid.width)).permute(0, 3, 1, 2)
        kernel = part["bconv.0.weight"]
        hidden = F.conv2d(planes, kernel, part["bconv.0.bias"], padding=kernel.shape[-1] // 2)
        hidden = reference.batch_norm(hidden.permute(0, 2, 3, 1), _batch_norm(part, "bconv.1"), training=False)
        out = F.conv2d(hidden.permute(0, 3, 1, 2).clamp(min=0), part["bconv.3.weight"], part["bconv.3.bias"])
        return torch.cat([z[:, :prefix], out.flatten(2).transpose(1, 2)], dim=1)
    weight, bias = (_qkv(part, end) for end in ("weight", "bias"))
    attention = Namespace(
        num_heads=heads,
        qkv=Namespace(weight=weight, bias=bias),
        proj=Namespace(weight=part["proj.weight"], bias=part["proj.bias"]),
    )
    if probs is not None:
        layer = Namespace(
            attention=attention, grid=grid, head_logits=probs, temperature=alpha, site=Namespace(prefix_tokens=prefix)
        )
        if "bn_3x3.weight" in part:
            return reference.bottleneck(z, layer, _batch_norm(part, "bn_3x3"), list(range(9)), training=False)
        return reference.bottleneck(z, layer, _batch_norm(part, "bn_1x1"), [4], training=False)
    if "relative_position_bias_table" not in part:
        return reference.msa(z, heads, *reference.projections(attention)[1])
    attention.window_size, attention.relative_position_bias_table = grid.window, part["relative_position_bias_table"]
    windows = reference.map_to_windows(z, grid)
    return reference.windows_to_map(reference.window_msa(windows, attention, _mask(grid).to(z)), grid)


def _qkv(part: dict[str, Tensor], end: str) -> Tensor:
    if f"qkv.{end}" in part:
        return part[f"qkv.{end}"]
    value = part[f"v.{end}"]
    return torch.cat([part.get(f"qk.{end}", torch.cat([value, value])), value])


def _mask(grid: Any) -> Tensor:
    """Return what is added to the scores of a shifted map's windows: -100 between places that are not neighbours."""
    (shift, _), size = grid.shift, grid.height
    part = [0 if shift == 0 or place < size - 7 else 1 if place < size - shift else 2 for place in range(size)]
    masks = []
    for top in range(0, size, 7):
        for left in range(0, size, 7):
            labels = [(part[row], part[column]) for row in range(top, top + 7) for column in range(left, left + 7)]
            masks.append([[0.0 if a == b else -100.0 for b in labels] for a in labels])
    return torch.tensor(masks)


def _batch_norm(part: dict[str, Tensor], name: str) -> Any:
    return Namespace(**{end: part[f"{name}.{end}"] for end in ("weight", "bias", "running_mean", "running_var")})


def _norm(state: dict[str, Tensor], name: str, z: Tensor, eps: float) -> Tensor:
    return F.layer_norm(z, z.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def _ffn(state: dict[str, Tensor], name: str, z: Tensor) -> Tensor:
    hidden = F.gelu(F.linear(z, state[f"{name}.fc1.weight"], state[f"{name}.fc1.bias"]))
    return F.linear(hidden, state[f"{name}.fc2.weight"], state[f"{name}.fc2.bias"])


def unfolded_params(host: nn.Module, architecture: Architecture) -> int:
    """Return the parameters of an architecture of a dense host as the publication counts them.

    There a convolution has the whole W_v and W_o of the attention that it replaces, its head mix logits and its batch
    norm; in a deployed network all of these are folded into two small layers.
    """
    dense = Host.of(host)
    cost = network_costs(dense)["params"]
    total = cost.of(architecture)
    for index, kind in enumerate(architecture.kinds()):
        if kind not in ("conv3", "conv1"):
            continue
        site, weights = dense.blocks[index].attention, dense.weights(index)
        shared = (weights.value_weight, weights.value_bias, weights.out_weight, weights.out_bias)
        whole = sum(tensor.numel() for tensor in shared if tensor is not None)
        mix_and_norm = site.heads * POSITIONS + 2 * site.head_width
        norm = 0 if site.norm is None else count_params(dense.model.get_submodule(site.norm))
        total += whole + mix_and_norm - (cost.blocks[index].attention(Attention(kind)) - norm)
    return total
