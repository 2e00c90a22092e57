"""Small vision transformers as people write them themselves, in many styles, for tests of recognition.

None knows spvit. What a recogniser must find in OWN stands in EXPECTED; own_refused.py has what must be turned away.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from einops.layers.torch import Rearrange, Reduce
from torch import Tensor, nn
from torch.nn import functional as F

import own_parts as parts


class Block(nn.Module):
    """A pre-norm block, with LayerScale and DropPath where asked."""

    def __init__(self, attn: nn.Module, mlp: nn.Module, scaled: bool = False, norm: type = nn.LayerNorm) -> None:
        super().__init__()
        self.norm1, self.attn = norm(24), attn
        self.ls1 = parts.LayerScale(24) if scaled else nn.Identity()
        self.norm2, self.mlp = norm(24), mlp
        self.ls2 = parts.LayerScale(24) if scaled else nn.Identity()
        self.drop_path = parts.DropPath(0.1 if scaled else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class PostNormBlock(nn.Module):
    """As in the first transformer; the FFN has no module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = parts.EagerAttention()
        self.linear1, self.linear2 = nn.Linear(24, 72), nn.Linear(72, 24)
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.self_attn(x)))
        return self.norm2(x + self.dropout(self.linear2(F.relu(self.linear1(x)))))


class ParallelBlock(nn.Module):
    """Attention and FFN read the same normalised tokens; queries and keys are normalised too, as in ViT-22B."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.attn = parts.PackedAttention(qk_norm=True)
        self.mlp = parts.Mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attn(y) + self.mlp(y)


class TwoNormParallelBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_a, self.norm_m = nn.LayerNorm(24), nn.LayerNorm(24)
        self.attention, self.ffn = parts.SeparateAttention(), parts.PackedGatedFFN()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm_a(x)) + self.ffn(self.norm_m(x))


class ViT(nn.Module):
    """What most people write around their blocks: patches, tokens in front, positions, a norm and a head."""

    def __init__(
        self, block: Callable[[], nn.Module], grid: tuple[int, int] = (4, 4), prefix: int = 1, classes: int = 7
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 24, kernel_size=8, stride=8)
        self.prefix = nn.Parameter(torch.zeros(1, prefix, 24)) if prefix else None
        self.pos_embed = nn.Parameter(torch.randn(1, prefix + grid[0] * grid[1], 24) * 0.02)
        self.blocks = nn.ModuleList([block() for _ in range(4)])
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, classes) if classes else nn.Identity()

    def embed(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], dim=1)
        return x + self.pos_embed

    def encode(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encode(self.embed(x))
        return self.head(x.mean(dim=1) if self.prefix is None else x[:, 0])


def vit(attn: Callable[[], nn.Module], mlp: Callable[[], nn.Module] = parts.Mlp, **options: Any) -> nn.Module:
    """Return a ViT of four pre-norm blocks with this attention and this FFN."""
    norm, scaled = options.pop("norm", nn.LayerNorm), options.pop("scaled", False)
    return ViT(lambda: Block(attn(), mlp(), scaled, norm), **options)


class Backbone(ViT):
    """A backbone without a head: answers all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(self.embed(x))


class RopeViT(ViT):
    """Makes one rotary table of the grid of the images and passes it to every block; no other positions."""

    def __init__(self) -> None:
        super().__init__(_RopeBlock, grid=(4, 6), prefix=0)
        self.pos_embed = None

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        sin, cos = parts.rotary_table((x.shape[2], x.shape[3]))
        rope = (sin.to(x), cos.to(x))
        x = x.flatten(2).mT
        for block in self.blocks:
            x = block(x, rope)
        return self.head(self.norm(x).mean(1))


class _RopeBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = parts.RMSNorm(24), parts.RMSNorm(24)
        self.attention, self.feed_forward = parts.RotaryAttention(), parts.GatedFFN()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope=rope)
        return x + self.feed_forward(self.ffn_norm(x))


class PairAttention(nn.Module):
    """Attention with its norm inside, of packed projections without biases, in einops."""

    def __init__(self, dim: int, heads: int, dim_head: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.norm = nn.LayerNorm(dim)
        self.attend, self.dropout = nn.Softmax(dim=-1), nn.Dropout(dropout)
        self.to_qkv = nn.Linear(dim, heads * dim_head * 3, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.heads)
        attn = self.dropout(self.attend(torch.einsum("bhid,bhjd->bhij", q, k) * self.scale))
        return self.to_out(rearrange(torch.einsum("bhij,bhjd->bhid", attn, v), "b h n d -> b n (h d)"))


class PairFeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, dim),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class PairTransformer(nn.Module):
    """Pairs of layers in lists; the residuals are here, so that no module is a block."""

    def __init__(self, dim: int, depth: int, heads: int, dim_head: int, mlp_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList([])
        for _ in range(depth):
            pair = [PairAttention(dim, heads, dim_head), PairFeedForward(dim, mlp_dim)]
            self.layers.append(nn.ModuleList(pair))

    def forward(self, x: Tensor) -> Tensor:
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return self.norm(x)


def _sincos(h: int, w: int, dim: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    omega = 1.0 / 10000 ** (torch.arange(dim // 4) / (dim // 4 - 1))
    y, x = (axis.flatten()[:, None] * omega[None] for axis in (y, x))
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), dim=1)


class PairViT(nn.Module):
    """A linear layer over patches cut by einops; a class token, or fixed positions and the mean of all tokens."""

    def __init__(self, grid: tuple[int, int] = (4, 4), dim_head: int = 8, simple: bool = False) -> None:
        super().__init__()
        self.simple = simple
        self.to_patch_embedding = nn.Sequential(
            Rearrange("b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=8, p2=8),
            nn.LayerNorm(192),
            nn.Linear(192, 24),
            nn.LayerNorm(24),
        )
        if simple:
            self.pos_embedding = _sincos(*grid, 24)  # neither a parameter nor a buffer
        else:
            self.pos_embedding = nn.Parameter(torch.randn(1, grid[0] * grid[1] + 1, 24))
            self.cls_token = nn.Parameter(torch.randn(1, 1, 24))
        self.dropout = nn.Dropout(0.1)
        self.transformer = PairTransformer(24, depth=4, heads=3, dim_head=dim_head, mlp_dim=72)
        self.to_latent = nn.Identity()
        self.linear_head = nn.Linear(24, 7)

    def forward(self, img: Tensor) -> Tensor:
        x = self.to_patch_embedding(img)
        if self.simple:
            x = x + self.pos_embedding.to(x.device, dtype=x.dtype)
            x = self.transformer(x).mean(dim=1)
        else:
            x = torch.cat((repeat(self.cls_token, "1 1 d -> b 1 d", b=x.shape[0]), x), dim=1)
            x = self.transformer(self.dropout(x + self.pos_embedding))[:, 0]
        return self.linear_head(self.to_latent(x))


class TutorialAttention(nn.Module):
    """The attention of a much copied tutorial: heads outermost, qkv innermost, logits over the root of the width."""

    def __init__(self, emb_size: int = 24, num_heads: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.emb_size, self.num_heads = emb_size, num_heads
        self.qkv = nn.Linear(emb_size, emb_size * 3)
        self.att_drop = nn.Dropout(dropout)
        self.projection = nn.Linear(emb_size, emb_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        qkv = rearrange(self.qkv(x), "b n (h d qkv) -> (qkv) b h n d", h=self.num_heads, qkv=3)
        queries, keys, values = qkv[0], qkv[1], qkv[2]
        energy = torch.einsum("bhqd, bhkd -> bhqk", queries, keys)
        if mask is not None:
            energy.masked_fill_(~mask, torch.finfo(torch.float32).min)
        att = self.att_drop(F.softmax(energy / self.emb_size ** (1 / 2), dim=-1))
        out = torch.einsum("bhal, bhlv -> bhav ", att, values)
        return self.projection(rearrange(out, "b h n d -> b n (h d)"))


class ResidualAdd(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        res = x
        x = self.fn(x, **kwargs)
        x += res
        return x


class TutorialEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Sequential(nn.Conv2d(3, 24, 8, 8), Rearrange("b e (h) (w) -> b (h w) e"))
        self.cls_token = nn.Parameter(torch.randn(1, 1, 24))
        self.positions = nn.Parameter(torch.randn(17, 24))

    def forward(self, x: Tensor) -> Tensor:
        x = self.projection(x)
        x = torch.cat([repeat(self.cls_token, "() n e -> b n e", b=x.shape[0]), x], dim=1)
        x += self.positions
        return x


def _tutorial() -> nn.Module:
    """Nothing but sequences of sequences, whose residuals are added in place."""

    def block() -> nn.Module:
        ffn = nn.Sequential(nn.Linear(24, 72), nn.GELU(), nn.Dropout(0.1), nn.Linear(72, 24))
        return nn.Sequential(
            ResidualAdd(nn.Sequential(nn.LayerNorm(24), TutorialAttention(), nn.Dropout(0.1))),
            ResidualAdd(nn.Sequential(nn.LayerNorm(24), ffn, nn.Dropout(0.1))),
        )

    head = nn.Sequential(Reduce("b n e -> b e", reduction="mean"), nn.LayerNorm(24), nn.Linear(24, 7))
    return nn.Sequential(TutorialEmbedding(), nn.Sequential(*(block() for _ in range(4))), head)


class MLPBlock(nn.Sequential):
    def __init__(self, in_dim: int, mlp_dim: int, dropout: float) -> None:
        linear_1, linear_2 = nn.Linear(in_dim, mlp_dim), nn.Linear(mlp_dim, in_dim)
        super().__init__(linear_1, nn.GELU(), nn.Dropout(dropout), linear_2, nn.Dropout(dropout))


class EncoderBlock(nn.Module):
    """PyTorch's own attention, called as in torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(24, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(24, 3, dropout=0.1, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.ln_2 = nn.LayerNorm(24, eps=1e-6)
        self.mlp = MLPBlock(24, 72, 0.1)

    def forward(self, input: Tensor) -> Tensor:
        torch._assert(input.dim() == 3, f"Expected (batch, tokens, width) got {input.shape}")
        x = self.ln_1(input)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        x = self.dropout(x) + input
        return x + self.mlp(self.ln_2(x))


class EncoderViT(nn.Module):
    """PyTorch's own encoder of its own layers."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 24, 8, stride=8)
        self.cls = nn.Parameter(torch.zeros(1, 1, 24))
        self.pos = nn.Parameter(torch.zeros(1, 17, 24))
        activation = "gelu" if norm_first else "relu"
        layer = nn.TransformerEncoderLayer(
            24, 3, 72, dropout=0.1, activation=activation, batch_first=True, norm_first=norm_first
        )
        norm = nn.LayerNorm(24) if norm_first else None
        self.encoder = nn.TransformerEncoder(layer, num_layers=4, norm=norm, enable_nested_tensor=False)
        self.fc = nn.Linear(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).flatten(2).permute(0, 2, 1)
        x = torch.cat((self.cls.repeat(x.size(0), 1, 1), x), dim=1) + self.pos
        return self.fc(self.encoder(x)[:, 0])


class CastingLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.type(self.weight.dtype)).type(x.dtype)


class ResidualAttentionBlock(nn.Module):
    def __init__(self, d_model: int, n_head: int, attn_mask: Tensor | None = None) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(d_model, n_head)
        self.ln_1 = CastingLayerNorm(d_model)
        layers = [
            ("c_fc", nn.Linear(d_model, d_model * 3)),
            ("gelu", parts.QuickGELU()),
            ("c_proj", nn.Linear(d_model * 3, d_model)),
        ]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = CastingLayerNorm(d_model)
        self.attn_mask = attn_mask

    def attention(self, x: Tensor) -> Tensor:
        self.attn_mask = self.attn_mask.to(dtype=x.dtype, device=x.device) if self.attn_mask is not None else None
        return self.attn(x, x, x, need_weights=False, attn_mask=self.attn_mask)[0]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ClipTower(nn.Module):
    """The image tower of a two-tower model: tokens first in its blocks, a projection, no classes."""

    def __init__(self) -> None:
        super().__init__()
        scale = 24**-0.5
        self.conv1 = nn.Conv2d(3, 24, kernel_size=8, stride=8, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(24))
        self.positional_embedding = nn.Parameter(scale * torch.randn(17, 24))
        self.ln_pre = CastingLayerNorm(24)
        self.resblocks = nn.Sequential(*[ResidualAttentionBlock(24, 3) for _ in range(4)])
        self.ln_post = CastingLayerNorm(24)
        self.proj = nn.Parameter(scale * torch.randn(24, 16))

    @property
    def dtype(self) -> torch.dtype:
        return self.conv1.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x.type(self.dtype))
        x = x.reshape(x.shape[0], x.shape[1], -1).permute(0, 2, 1)
        zeros = torch.zeros(x.shape[0], 1, x.shape[-1], dtype=x.dtype, device=x.device)
        x = torch.cat([self.class_embedding.to(x.dtype) + zeros, x], dim=1)
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))
        x = self.resblocks(x.permute(1, 0, 2)).permute(1, 0, 2)
        return self.ln_post(x[:, 0, :]) @ self.proj


@dataclass
class ImageOutput:
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


torch.export.register_dataclass(ImageOutput, serialized_type_name="own_models.ImageOutput")


class _SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(24, 24) for _ in range(3))
        self.dense = nn.Linear(24, 24)

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        shape = (*hidden_states.shape[:-1], -1, 8)
        query, key, value = (
            layer(hidden_states).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        probabilities = nn.functional.softmax(query @ key.transpose(-1, -2) / math.sqrt(8), dim=-1)
        context = (probabilities @ value).permute(0, 2, 1, 3).contiguous()
        output = self.dense(context.view(*context.shape[:-2], 24))
        return (output, probabilities) if output_attentions else (output,)


class _Output(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.dropout = nn.Linear(72, 24), nn.Dropout(0.1)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.dropout(self.dense(hidden_states)) + input_tensor


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(24), nn.LayerNorm(24)
        self.attn = _SelfAttention()
        self.intermediate = nn.Linear(24, 72)
        self.output = _Output()

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        outputs = self.attn(hidden_states=self.layernorm_before(hidden_states), output_attentions=output_attentions)
        hidden_states = outputs[0] + hidden_states
        inner = F.gelu(self.intermediate(self.layernorm_after(hidden_states)))
        return (self.output(inner, hidden_states), *outputs[1:])


class KeywordViT(nn.Module):
    """Takes `pixel_values`, calls by keyword, answers tuples inside and a dataclass outside."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, 24, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 24))
        self.position_embeddings = nn.Parameter(torch.randn(1, 17, 24))
        self.layer = nn.ModuleList(_Layer() for _ in range(4))
        self.layernorm = nn.LayerNorm(24)
        self.classifier = nn.Linear(24, 7)

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> ImageOutput:
        x = self.projection(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.position_embeddings
        states = [x]
        for layer in self.layer:
            x = layer(x)[0]
            states.append(x)
        hidden_states = tuple(states) if output_hidden_states else None
        return ImageOutput(logits=self.classifier(self.layernorm(x)[:, 0]), hidden_states=hidden_states)


class Segmenter(nn.Module):
    """A dense prediction: a backbone, and convolutions over its patch tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone(lambda: Block(parts.PackedAttention(), parts.Mlp(), scaled=True), (4, 6), prefix=1)
        self.decode_head = nn.Sequential(nn.Conv2d(24, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 7, 1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.backbone(x)[:, 1:]
        maps = tokens.transpose(1, 2).reshape(x.shape[0], -1, x.shape[2] // 8, x.shape[3] // 8)
        return F.interpolate(self.decode_head(maps), size=x.shape[-2:], mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Expected:
    """What a correct recogniser finds; every model has 4 blocks, and takes 3 channels."""

    head_width: int = 8
    prefix_tokens: int = 1
    grid: tuple[int, int] = (4, 4)
    narrows_queries: bool = True
    narrows_values: bool = True
    classes: int = 7
    """Outputs of the head; 0 when the model answers features."""
    blocks: int = 4
    patch: int = 8
    stages: bool = False
    """Whether the last two blocks work on half the grid, with one head more and twice the width."""
    windows: tuple[int, ...] = (1, 1, 1, 1)

    def heads(self, block: int) -> tuple[int, int]:
        """Return the heads of a block and their width."""
        return (4, 12) if self.later(block) else (3, self.head_width)

    def units(self, block: int) -> int:
        """Return the hidden units of a block's FFN."""
        return 144 if self.later(block) else 72

    def grid_of(self, block: int) -> tuple[int, int]:
        """Return (height, width) of the patches that a block works on."""
        return (self.grid[0] // 2, self.grid[1] // 2) if self.later(block) else self.grid

    def later(self, block: int) -> bool:
        """Return whether a block is in the second of two stages."""
        return self.stages and block >= 2

    @property
    def image(self) -> tuple[int, int, int]:
        """(channels, height, width) of its images."""
        return (3, self.patch * self.grid[0], self.patch * self.grid[1])


OWN: dict[str, Callable[[], nn.Module]] = {
    "separate": lambda: vit(parts.SeparateAttention),
    "packed_registers": lambda: vit(parts.PackedAttention, scaled=True, grid=(4, 6), prefix=4),
    "head_major": lambda: vit(parts.HeadMajorAttention),
    "packed_keys_swiglu": lambda: vit(parts.PackedKeysAttention, parts.GatedFFN, norm=parts.RMSNorm, prefix=0),
    "tutorial": _tutorial,
    "pairs": lambda: PairViT(grid=(4, 6), dim_head=10),
    "pairs_simple": lambda: PairViT(simple=True),
    "multihead": lambda: ViT(EncoderBlock, grid=(4, 6)),
    "encoder_pre_norm": lambda: EncoderViT(norm_first=True),
    "encoder_post_norm": lambda: EncoderViT(norm_first=False),
    "clip": ClipTower,
    "post_norm": lambda: ViT(PostNormBlock),
    "parallel": lambda: ViT(ParallelBlock),
    "parallel_two_norms": lambda: ViT(TwoNormParallelBlock, prefix=0),
    "packed_swiglu": lambda: vit(parts.PackedAttention, parts.PackedGatedFFN, scaled=True),
    "rope_buffer": lambda: vit(lambda: parts.RotaryAttention((4, 4), prefix=3), prefix=3),
    "rope_argument": RopeViT,
    "relative_bias": lambda: vit(lambda: parts.BiasedAttention((4, 6)), grid=(4, 6), prefix=0),
    "qk_norm": lambda: vit(lambda: parts.PackedAttention(qk_norm=True), parts.GatedFFN, prefix=0),
    "keyword": KeywordViT,
    "segmenter": Segmenter,
    "backbone": lambda: Backbone(lambda: Block(parts.SeparateAttention(), parts.Mlp()), prefix=5, classes=0),
}

EXPECTED: dict[str, Expected] = {
    "separate": Expected(),
    "packed_registers": Expected(grid=(4, 6), prefix_tokens=4),
    "head_major": Expected(head_width=10),
    "packed_keys_swiglu": Expected(prefix_tokens=0),
    "tutorial": Expected(),
    "pairs": Expected(grid=(4, 6), head_width=10),
    "pairs_simple": Expected(prefix_tokens=0),
    "multihead": Expected(grid=(4, 6)),
    "encoder_pre_norm": Expected(),
    "encoder_post_norm": Expected(),
    "clip": Expected(classes=0),
    "post_norm": Expected(),
    "parallel": Expected(narrows_queries=False),
    "parallel_two_norms": Expected(prefix_tokens=0),
    "packed_swiglu": Expected(),
    "rope_buffer": Expected(prefix_tokens=3),
    "rope_argument": Expected(grid=(4, 6), prefix_tokens=0),
    "relative_bias": Expected(grid=(4, 6), prefix_tokens=0, narrows_queries=False),
    "qk_norm": Expected(prefix_tokens=0, narrows_queries=False),
    "keyword": Expected(),
    "segmenter": Expected(grid=(4, 6)),
    "backbone": Expected(prefix_tokens=5, classes=0),
}
