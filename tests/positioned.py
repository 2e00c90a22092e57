"""Tiny vision transformers in whose attention the places of tokens act, and what is found there; 3 heads each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import own_models
import own_parts as parts
from spvit.hosts.sites import Bias, Rotary

SMALL: dict[str, Any] = {"img_size": 64, "depth": 2, "num_classes": 7, "embed_dim": 48, "num_heads": 3}


class ComplexAttention(parts.EagerAttention):
    """Pairs of dimensions as complex numbers, times a complex buffer; queries are scaled before."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        angles = torch.arange(tokens)[:, None] * 10.0 ** -torch.arange(4)
        self.freqs_cis = torch.polar(torch.ones_like(angles), angles)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (to(x).unflatten(2, (3, 8)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        freqs = self.freqs_cis.to(x.device)
        q, k = (torch.view_as_complex(part.unflatten(3, (4, 2))) * freqs for part in (q * 8**-0.5, k))
        q, k = (torch.view_as_real(part).flatten(3) for part in (q, k))
        return self.to_out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Tables(nn.Module):
    """Half as many cosines and sines as a head is wide, of every head, inside a module of the attention."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        angles = torch.arange(tokens)[None, :, None] * torch.rand(3, 1, 4, generator=torch.Generator().manual_seed(0))
        self.register_buffer("cos", angles.cos()[None])
        self.register_buffer("sin", angles.sin()[None])

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = (torch.cat((table, table), -1) for table in (self.cos, self.sin))
        return parts.rotate(x, sin.to(x), cos.to(x))


class TablesAttention(nn.Module):
    """Normalised queries and keys, which a module inside rotates; a learned bias of all pairs of tokens."""

    def __init__(self, tokens: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.q_norm, self.k_norm = parts.RMSNorm(8), parts.RMSNorm(8)
        self.qkv, self.proj, self.rope = nn.Linear(24, 72), nn.Linear(24, 24), Tables(tokens)
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        q, k = self.rope(self.q_norm(q)), self.rope(self.k_norm(k))
        return self.proj(F.scaled_dot_product_attention(q, k, v, self.bias).transpose(1, 2).flatten(2))


class PatchBiasAttention(parts.EagerAttention):
    """A bias [heads, entries] for pairs of patches alone, from an index that is a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = nn.Parameter(torch.zeros(3, 31))
        self.places = torch.arange(16)[:, None] - torch.arange(16) + 15

    def logits(self, logits: Tensor) -> Tensor:
        return logits + F.pad(self.entries[:, self.places], (1, 0, 1, 0))


class TwoBiasesAttention(parts.EagerAttention):
    """The bias is the sum of two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs, self.other = nn.Parameter(torch.zeros(3, 17, 17)), nn.Parameter(torch.zeros(17, 17))

    def logits(self, logits: Tensor) -> Tensor:
        return logits + self.pairs + self.other


class TemperatureAttention(parts.EagerAttention):
    """One factor of all logits is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1))

    def logits(self, logits: Tensor) -> Tensor:
        return logits * self.temperature.exp()


class CosineAttention(parts.EagerAttention):
    """Queries and keys have length one; each head learns how much their products count, and the bias of one network."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.zeros(3, 1, 1))
        self.places = nn.Parameter(torch.zeros(17, 17, 2))
        self.network = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (to(x).unflatten(2, (3, 8)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.factors.exp().clamp(max=100)
        logits = logits + self.network(self.places.tanh()).permute(2, 0, 1)
        return self.to_out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


class TablesBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.attn, self.mlp = TwoTablesAttention(), parts.Mlp()

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), sin, cos)
        return x + self.mlp(self.norm2(x))


class TwoTablesAttention(parts.RotaryAttention):
    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        return super().forward(x, (sin, cos))


class TwoTablesViT(own_models.ViT):
    """Passes sines and cosines [tokens, 1, E] one by one, by position."""

    def __init__(self) -> None:
        super().__init__(TablesBlock, prefix=0)
        sin, cos = parts.rotary_table((4, 4))
        self.register_buffer("sin", sin)
        self.register_buffer("cos", cos)

    def encode(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.sin, self.cos)
        return self.norm(x)


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return pytest.importorskip("timm").create_model(name, **{**SMALL, **options})

    return make


def _huggingface(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        config = {"image_size": 64, "patch_size": 16, "hidden_size": 48, "intermediate_size": 96}
        config |= {"num_hidden_layers": 2, "num_attention_heads": 3}
        return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config, **options))

    return make


@dataclass(frozen=True)
class Positioned:
    """A model, and what must be found in its attention."""

    make: Callable[[], nn.Module]
    rotary: Rotary | None = None
    bias: Bias | None = None
    size: int = 64
    normed: bool = False
    cosine: bool = False
    scaled: bool = False
    """Whether its scales are learned."""

    def images(self, batch: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, 3, self.size, self.size, generator=generator, dtype=torch.float64)


def _rope(pairs: bool, by_head: bool = False) -> Rotary:
    return Rotary(("rope",), argument=True, sine_first=True, pairs=pairs, by_head=by_head)


def _inside(*tables: str, sine_first: bool = False, pairs: bool = False, by_head: bool = False) -> Rotary:
    return Rotary(tables, False, sine_first, pairs, by_head)


TABLE, INDEX = "relative_position_bias_table", "relative_position_index"
POSITIONED = {
    "eva02": Positioned(_timm("eva02_tiny_patch14_224", img_size=56), _rope(pairs=True), size=56),
    "dinov3": Positioned(_timm("vit_small_patch16_dinov3"), _rope(pairs=False)),
    "mixed": Positioned(_timm("vit_small_patch16_rope_mixed_224"), _rope(pairs=True, by_head=True)),
    "axial_normed": Positioned(_timm("vit_small_patch16_rope_224", qk_norm=True), _rope(pairs=True), normed=True),
    "beit": Positioned(_timm("beit_base_patch16_224"), bias=Bias(TABLE, False, index=INDEX)),
    "beit_shared": Positioned(
        _timm("beit_base_patch16_224", use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
        bias=Bias("shared_rel_pos_bias", True),
    ),
    "relpos": Positioned(
        _timm("vit_relpos_base_patch16_clsgap_224", rel_pos_type="bias"),
        bias=Bias(f"rel_pos.{TABLE}", False, index=f"rel_pos.{INDEX}"),
    ),
    "mlp_bias": Positioned(
        _timm("vit_relpos_small_patch16_224"), bias=Bias(None, False, index=f"rel_pos.{INDEX}", entries=49)
    ),
    "two_biases": Positioned(
        lambda: own_models.vit(TwoBiasesAttention), bias=Bias(None, False, entries=17 * 17), size=32
    ),
    "temperature": Positioned(lambda: own_models.vit(TemperatureAttention), size=32, scaled=True),
    "cosine": Positioned(
        lambda: own_models.vit(CosineAttention),
        bias=Bias(None, False, entries=17 * 17),
        size=32,
        cosine=True,
        scaled=True,
    ),
    "hf_dinov3": Positioned(
        _huggingface("DINOv3ViT"), Rotary(("position_embeddings",), True, sine_first=False, pairs=False, by_head=False)
    ),
    "hf_beit": Positioned(_huggingface("Beit", use_relative_position_bias=True), bias=Bias("attention_mask", True)),
    "rope_buffer": Positioned(own_models.OWN["rope_buffer"], _inside("sin", "cos", sine_first=True), size=32),
    "relative_bias": Positioned(
        lambda: own_models.vit(lambda: parts.BiasedAttention((4, 4)), prefix=0),
        bias=Bias(TABLE, False, index=INDEX),
        size=32,
    ),
    "complex": Positioned(
        lambda: own_models.vit(lambda: ComplexAttention(17)), _inside("freqs_cis", pairs=True), size=32
    ),
    "two_arguments": Positioned(
        TwoTablesViT, Rotary(("sin", "cos"), True, sine_first=True, pairs=False, by_head=False), size=32
    ),
    "rotary_and_bias": Positioned(
        lambda: own_models.vit(lambda: TablesAttention(17, (1, 3, 17, 17))),
        _inside("rope.cos", "rope.sin", by_head=True),
        Bias("bias", False, heads_first=True),
        size=32,
        normed=True,
    ),
    "patch_bias": Positioned(
        lambda: own_models.vit(PatchBiasAttention),
        bias=Bias("entries", False, heads_first=True, index="places"),
        size=32,
    ),
}
