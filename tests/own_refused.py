"""Models that recognition must refuse for a reason that matches (REFUSED), or may refuse (EITHER)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

import own_parts as parts
from own_models import Block, ViT, vit


class HardMlp(parts.Mlp):
    """A plain FFN that says its width a second time."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.fc1(x))
        return self.fc2(torch.cat([h[..., :36], h[..., 36:72]], dim=-1).view(x.shape[0], -1, 72))


class WidthReadingMlp(parts.Mlp):
    """Divides by the width that its layers say."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x))) * 8 / math.sqrt(self.fc1.out_features)


class QuietGatedMlp(parts.Mlp):
    """Gates its output by the mean of all units, behind a layer scale that training has not moved."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((24,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.fc1(x))
        return self.gamma * self.fc2(hidden) * torch.sigmoid(8 * hidden.mean(-1, keepdim=True))


class AssertingMlp(parts.Mlp):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.fc1(x))
        assert hidden.shape[-1] == 72
        return self.fc2(hidden)


class ChunkedMlp(parts.Mlp):
    """Runs for some tokens at a time, which takes less memory."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.fc2(self.act(self.fc1(part))) for part in x.split(6, dim=1)], dim=1)


class UnreadableViT(ViT):
    """Looks something up that an image does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward({"image": x}["pixel_values"])


class ValueReadingViT(ViT):
    """Its way depends on what is in the images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / 255 if x.max().item() > 100 else x)


class GroupedMixing(nn.Module):
    """A grouped convolution over the hidden units of each token: groups of 8 units see each other."""

    def __init__(self, hidden: int = 72) -> None:
        super().__init__()
        self.conv = nn.Conv1d(hidden, hidden, 1, groups=hidden // 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class DepthwiseMixing(nn.Module):
    """A depthwise convolution over the patches between the layers of an FFN, as LocalViT has it."""

    def __init__(self, hidden: int = 72, grid: tuple[int, int] = (4, 4)) -> None:
        super().__init__()
        self.grid = grid
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:
        patches = rearrange(x[:, 1:], "b (h w) c -> b c h w", h=self.grid[0])
        return torch.cat([x[:, :1], rearrange(self.conv(patches), "b c h w -> b (h w) c")], dim=1)


class ResponseNorm(nn.Module):
    """The global response norm of ConvNeXt V2: every unit divided by its norm over the tokens, against all units'."""

    def __init__(self, hidden: int = 72) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=1, keepdim=True)
        return x + self.gamma * x * size / (size.mean(dim=-1, keepdim=True) + 1e-6)


class TalkingHeads(parts.EagerAttention):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(self.heads, self.heads)

    def logits(self, logits: Tensor) -> Tensor:
        return self.mix(logits.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CausalAttention(parts.EagerAttention):
    def logits(self, logits: Tensor) -> Tensor:
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        return logits.masked_fill(future, float("-inf"))


class FusedCausalAttention(parts.SeparateAttention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.w_q(x)), self.split(self.w_k(x)), self.split(self.w_v(x))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.w_o(out.transpose(1, 2).flatten(2))


class NormedValues(parts.EagerAttention):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def values(self, v: Tensor) -> Tensor:
        return self.norm(v)


class ActivatedValues(parts.EagerAttention):
    def values(self, v: Tensor) -> Tensor:
        return F.gelu(v)


class SoftCapped(parts.EagerAttention):
    """Capped logits, as in Gemma: what enters the softmax is no product of queries and keys."""

    def logits(self, logits: Tensor) -> Tensor:
        return 5 * torch.tanh(logits / 5)


class LinearAttention(parts.EagerAttention):
    """Attention without a softmax over the keys, as efficient variants have it."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(to(x), "b n (h d) -> b h n d", h=self.heads) for to in (self.to_q, self.to_k, self.to_v))
        out = q.softmax(-1) @ (k.softmax(-2).mT @ v)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class LateScaling(parts.EagerAttention):
    """Scales after the softmax, a well-known slip of tutorials."""

    def weights(self, weights: Tensor) -> Tensor:
        return weights / math.sqrt(24)


class OneKeyHead(nn.Module):
    """Multi-query attention: all heads share one head of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(24, 24), nn.Linear(24, 16), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=3)
        k, v = self.kv(x).unsqueeze(1).chunk(2, dim=-1)
        return self.o(rearrange((q @ k.mT / 8**0.5).softmax(-1) @ v, "b h n d -> b n (h d)"))


class RawParameters(nn.Module):
    """Weights as plain parameters [D, H, E], as ports from JAX have them."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(24, 3, 8) / 5) for _ in range(3))
        self.wo = nn.Parameter(torch.randn(3, 8, 24) / 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bnd,dhe->bhne", x, w) for w in (self.wq, self.wk, self.wv))
        weights = torch.einsum("bhne,bhme->bhnm", q / 8**0.5, k).softmax(-1)
        return torch.einsum("bhnm,bhme,hed->bnd", weights, v, self.wo)


class NoProjection(parts.EagerAttention):
    """Leaves the output projection out."""

    def __init__(self) -> None:
        super().__init__()
        self.to_out = nn.Identity()


class InlineBlock(nn.Module):
    """A whole block in one module: there is no attention layer to put something else in the place of."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.qkv, self.proj, self.up, self.down = (nn.Linear(*s) for s in ((24, 72), (24, 24), (24, 72), (72, 24)))

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        q, k, v = self.qkv(self.ln1(x)).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.ln2(x))) ** 2)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 8, 8)
        self.body = nn.Sequential(*(nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.ReLU()) for _ in range(4)))
        self.head = nn.Linear(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class TextTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 24)
        self.blocks = nn.Sequential(*(_plain() for _ in range(4)))
        self.head = nn.Linear(24, 7)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(input_ids)).mean(1))


class TokenMixing(nn.Module):
    """What stands in an MLP-Mixer where attention stands in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = parts.Mlp(17, 72)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.mT).mT


class SharedViT(ViT):
    """One block run four times, as in ALBERT."""

    def encode(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = self.blocks[0](x)
        return self.norm(x)


class LastTokenViT(ViT):
    """Its class token stands behind the patches."""

    def embed(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return torch.cat([x, self.prefix.expand(x.shape[0], -1, -1)], dim=1) + self.pos_embed

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(self.embed(x))[:, -1])


class ThinningViT(ViT):
    """Between its blocks the patches with the largest activations are kept, or neighbours are merged."""

    merge = False

    def encode(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == 1 and self.merge:
                x = torch.cat([x[:, :1], x[:, 1:].unflatten(1, (-1, 2)).mean(2)], dim=1)
            elif index == 1:
                kept = x[:, 1:].norm(dim=-1).topk(8, dim=1).indices.sort(dim=1).values
                x = torch.cat([x[:, :1], x[:, 1:].gather(1, kept[..., None].expand(-1, -1, 24))], dim=1)
        return self.norm(x)


class MergingViT(ThinningViT):
    merge = True


def _plain() -> nn.Module:
    return Block(parts.SeparateAttention(), parts.Mlp())


def _mixed(between: Callable[[], nn.Module]) -> nn.Module:
    return vit(parts.PackedAttention, lambda: parts.Mlp(between=between()))


UNITS = "unit|hidden|FFN"
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "cnn": (ConvNet, "attention"),
    "text": (TextTransformer, "imag|embedding|run"),
    "mixer": (lambda: vit(TokenMixing), "attention"),
    "linear_attention": (lambda: vit(LinearAttention), "attention|softmax"),
    "causal": (lambda: vit(CausalAttention, prefix=0), "mask|causal|-inf|logits"),
    "causal_fused": (lambda: vit(FusedCausalAttention, prefix=0), "mask|causal"),
    "normed_values": (lambda: vit(NormedValues), "value"),
    "activated_values": (lambda: vit(ActivatedValues), "value"),
    "dropped_patches": (lambda: ThinningViT(_plain), "token|patch"),
    "merged_tokens": (lambda: MergingViT(_plain), "token|patch"),
    "class_token_last": (lambda: LastTokenViT(_plain), "prefix|last|first|order|behind|patch"),
    "shared_block": (lambda: SharedViT(_plain), "same|twice|shared|more than once|times"),
    "grouped_units": (lambda: _mixed(GroupedMixing), UNITS),
    "response_norm": (lambda: _mixed(ResponseNorm), UNITS),
    "hard_width": (lambda: vit(parts.PackedAttention, HardMlp), UNITS + "|narrow"),
    "width_read": (lambda: vit(parts.PackedAttention, WidthReadingMlp), "with half its units"),
    "gated_quietly": (lambda: vit(parts.PackedAttention, QuietGatedMlp), "with half its units"),
    "width_asserted": (lambda: vit(parts.PackedAttention, AssertingMlp), "fewer units .AssertionError"),
    "chunks_of_tokens": (lambda: vit(parts.PackedAttention, ChunkedMlp), "runs 3 times"),
    "lookup_fails": (lambda: UnreadableViT(_plain), "forward pass fails.*pixel_values"),
    "values_read": (lambda: ValueReadingViT(_plain), "cannot be counted on the meta device"),
    "hard_gate": (lambda: vit(parts.PackedAttention, partial(parts.PackedGatedFFN, hard=True)), UNITS + "|narrow"),
}

EITHER: dict[str, Callable[[], nn.Module]] = {
    "talking_heads": lambda: vit(TalkingHeads),  # whole or replaced: its values and output are plain
    "soft_capped": lambda: vit(SoftCapped),
    "late_scaling": lambda: vit(LateScaling),
    "one_key_head": lambda: vit(OneKeyHead),
    "raw_parameters": lambda: vit(RawParameters),
    "no_projection": lambda: vit(NoProjection),
    "inline": lambda: ViT(InlineBlock),
    "local_units": lambda: _mixed(DepthwiseMixing),  # one kernel a unit: it gets narrower with the units
    "norm_over_units": lambda: _mixed(lambda: nn.LayerNorm(72)),
}
