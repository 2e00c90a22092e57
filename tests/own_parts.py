"""Attention layers and FFNs as people write them: parts of the models in own_models.py."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class LayerScale(nn.Module):
    def __init__(self, dim: int, init_values: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(init_values * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - self.p) / (1 - self.p)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SeparateAttention(nn.Module):
    """One linear layer each, and the fused function."""

    def __init__(self, d_model: int = 24, n_heads: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.w_q = nn.Linear(d_model, d_model)
        self.w_k = nn.Linear(d_model, d_model, bias=False)
        self.w_v = nn.Linear(d_model, d_model)
        self.w_o = nn.Linear(d_model, d_model)

    def split(self, x: Tensor) -> Tensor:
        b, n, d = x.size()
        return x.view(b, n, self.n_heads, d // self.n_heads).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.w_q(x)), self.split(self.w_k(x)), self.split(self.w_v(x))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.w_o(out.transpose(1, 2).contiguous().view(x.size(0), x.size(1), -1))


class PackedAttention(nn.Module):
    """Packed queries, keys and values, permuted; optionally with norms on the queries and keys of a head."""

    def __init__(self, dim: int = 24, num_heads: int = 3, qk_norm: bool = False, proj_drop: float = 0.1) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))


class HeadMajorAttention(nn.Module):
    """Every head's queries, keys and values side by side; queries scaled first; heads wider than the model."""

    def __init__(self, dim: int = 24, heads: int = 3, head_dim: int = 10) -> None:
        super().__init__()
        self.heads, self.head_dim, self.scale = heads, head_dim, head_dim**-0.5
        self.qkv = nn.Linear(dim, heads * 3 * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, self.heads, 3 * self.head_dim).permute(0, 2, 1, 3)
        q, k, v = qkv.chunk(3, dim=-1)
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.out((weights @ v).permute(0, 2, 1, 3).reshape(b, n, -1))


class PackedKeysAttention(nn.Module):
    """Queries apart from packed keys and values; logits divided afterwards."""

    def __init__(self, dim: int = 24, num_heads: int = 3, attn_drop: float = 0.1) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q = self.q(x).reshape(B, N, self.num_heads, self.head_dim).permute(0, 2, 1, 3)
        kv = self.kv(x).reshape(B, -1, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        attn = torch.matmul(q, kv[0].transpose(-2, -1)) / math.sqrt(self.head_dim)
        attn = self.attn_drop(torch.softmax(attn, dim=-1))
        return self.proj(torch.matmul(attn, kv[1]).transpose(1, 2).reshape(B, N, C))


class EagerAttention(nn.Module):
    """Attention in plain products, with a place for everything that a variant does to values or logits."""

    def __init__(self, dim: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))

    def logits(self, logits: Tensor) -> Tensor:
        return logits

    def weights(self, weights: Tensor) -> Tensor:
        return weights

    def values(self, v: Tensor) -> Tensor:
        return v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(to(x), "b n (h d) -> b h n d", h=self.heads) for to in (self.to_q, self.to_k, self.to_v))
        logits = q @ k.mT * q.shape[-1] ** -0.5
        out = self.weights(self.logits(logits).softmax(-1)) @ self.values(v)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class BiasedAttention(EagerAttention):
    """A learned bias for every offset between two patches of a grid, added to the logits."""

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        h, w = grid
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * h - 1) * (2 * w - 1), self.heads))
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        y, x = (c.flatten()[:, None] - c.flatten()[None] for c in (y, x))
        self.register_buffer("relative_position_index", (y + h - 1) * (2 * w - 1) + x + w - 1)

    def logits(self, logits: Tensor) -> Tensor:
        return logits + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1).unsqueeze(0)


def rotary_table(grid: tuple[int, int], head_width: int = 8) -> tuple[Tensor, Tensor]:
    """Return sines and cosines [h * w, head width] of two-dimensional rotary embeddings."""
    frequencies = 10.0 ** -torch.arange(0, 1, 4 / head_width)
    places = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float32) for side in grid))
    angles = (places[:, :, None] * frequencies).flatten(1).repeat(1, 2)
    return angles.sin(), angles.cos()


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class RotaryAttention(nn.Module):
    """Rotates queries and keys of patches, not of prefix tokens, by a buffer of its own or a table that it is given."""

    def __init__(self, grid: tuple[int, int] | None = None, prefix: int = 0) -> None:
        super().__init__()
        self.prefix = prefix
        self.qkv = nn.Linear(24, 72)
        self.proj = nn.Linear(24, 24)
        if grid:
            for name, table in zip(("sin", "cos"), rotary_table(grid)):
                self.register_buffer(name, table, persistent=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
        sin, cos = rope if rope is not None else (self.sin, self.cos)
        p = self.prefix
        q, k = (torch.cat([t[:, :, :p], rotate(t[:, :, p:], sin, cos)], dim=2).type_as(v) for t in (q, k))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(x.reshape(B, N, -1))


class Mlp(nn.Module):
    def __init__(self, dim: int = 24, hidden: int = 72, drop: float = 0.1, between: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.between = nn.Identity() if between is None else between
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.between(self.drop(self.act(self.fc1(x))))))


class GatedFFN(nn.Module):
    """SwiGLU with a gate apart, as LLaMA names it."""

    def __init__(self, dim: int = 24, hidden: int = 72) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PackedGatedFFN(nn.Module):
    """SwiGLU of one packed linear layer, as DINOv2 names it; `hard` splits it at a number instead of the middle."""

    def __init__(self, dim: int = 24, hidden: int = 72, hard: bool = False) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)
        self.hard = hard

    def forward(self, x: Tensor) -> Tensor:
        h = self.w12(x)
        x1, x2 = (h[..., :72], h[..., 72:]) if self.hard else h.chunk(2, dim=-1)
        return self.w3(F.silu(x1) * x2)
