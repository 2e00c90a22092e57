"""Attention with fewer heads or dimensions, as a module.

Shapes: B batch, N tokens, D width, H heads, E head width, R query/key dimensions and V value dimensions of a head; of
tables n tokens that rotate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spvit.architecture import Attention
from spvit.errors import GridError
from spvit.hosts.position import (
    bias_of_pairs,
    cosines_and_sines,
    dimensions_of,
    entries_by_head,
    inside_layer,
    measured_logits,
    rotated,
)
from spvit.hosts.sites import AttentionSite
from spvit.hosts.units import narrowed
from spvit.hosts.weights import AttentionWeights, read_weights


class NarrowAttention(nn.Module):
    """Attention with fewer heads or dimensions than the layer it replaces: one packed projection, fused attention.

    Takes the arguments of that layer; a mask is added to the logits. The softmax keeps the original layer's scale.
    Where the places of tokens act on queries, keys or logits, so they do here: `bias_table` [entries, H] is learned,
    and so is `head_scales` [H, 1, 1] where the layer scales the logits of each head.

    Attributes: `first`, how many of the tokens, the first ones, it answers for (`answer_first`); None: all of them.
    """

    first: int | None = None
    query: nn.Linear
    key_value: nn.Linear
    kept_heads: Tensor | None
    pairs: Tensor | None
    cosines: Tensor | None
    sines: Tensor | None
    bias_index: Tensor | None
    bias_table: nn.Parameter | None
    head_scales: nn.Parameter | None

    def __init__(self, layer: nn.Module, site: AttentionSite, kept: Attention) -> None:
        """Make room for what is kept of the dense layer at a site; its weights are loaded next."""
        super().__init__()
        weights = read_weights(layer, site)
        like: dict[str, Any] = {"device": weights.value_weight.device, "dtype": weights.value_weight.dtype}
        self.heads = site.heads if kept.heads is None else len(kept.heads)
        self.query_key_rank = site.head_width if kept.query_key_rank is None else kept.query_key_rank
        self.value_rank = site.head_width if kept.value_rank is None else kept.value_rank
        self.scale, self.dropout = site.scale, site.dropout
        rows, with_bias = self.heads * (2 * self.query_key_rank + self.value_rank), has_biases(weights)
        self.qkv = nn.utils.skip_init(nn.Linear, site.dim, rows, bias=with_bias, **like)
        self.query_norm, self.key_norm, self.out_norm = (
            nn.Identity() if name is None else layer.get_submodule(name) for name in site.norms
        )
        columns, with_bias = self.heads * self.value_rank, weights.out_bias is not None
        self.proj = nn.utils.skip_init(nn.Linear, columns, site.dim, bias=with_bias, **like)
        self.out_drop = nn.Dropout(site.out_dropout)
        self._place(layer, site, None if kept.heads is None else torch.tensor(kept.heads, device=like["device"]))

    def _place(self, layer: nn.Module, site: AttentionSite, kept_heads: Tensor | None) -> None:
        """Take over what the places of tokens do in the dense layer, for the kept heads (None: all)."""
        self.rotary, self.bias, self.cosine = site.rotary, site.bias, site.cosine
        self.host_heads, self.head_width = site.heads, site.head_width
        self.register_buffer("kept_heads", kept_heads, persistent=False)
        pairs = torch.arange(self.query_key_rank // 2, device=self.qkv.weight.device).repeat(self.heads, 1)
        fewer = site.rotary is not None and self.query_key_rank < site.head_width
        self.register_buffer("pairs", pairs if fewer else None)
        cosines = sines = index = table = None
        if site.rotary is not None and not site.rotary.argument:
            values = [inside_layer(layer, name) for name in site.rotary.tables]
            tables = cosines_and_sines(site.rotary, values, site.heads, site.head_width)
            cosines, sines = (self._of_heads(table) for table in tables)
        scales, entries = measured_logits(layer, site)
        if site.bias is not None and not site.bias.argument:
            if site.bias.table is not None:
                entries = entries_by_head(site.bias, layer.get_parameter(site.bias.table), site.heads).detach()
            assert entries is not None
            table = nn.Parameter((entries if kept_heads is None else entries[:, kept_heads]).clone())
            index = None if site.bias.index is None else inside_layer(layer, site.bias.index).flatten()
        if scales is not None:
            scales = nn.Parameter((scales if kept_heads is None else scales[kept_heads])[:, None, None].clone())
        self.register_parameter("head_scales", scales)
        for name, buffer in (("cosines", cosines), ("sines", sines), ("bias_index", index)):
            self.register_buffer(name, buffer, persistent=False)
        self.register_parameter("bias_table", table)

    @torch.no_grad()
    def load(self, weights: AttentionWeights) -> None:
        """Take over weights of the layer's own shapes, in place."""
        parts = (weights.query_weight, weights.key_weight, weights.value_weight)
        self.qkv.weight.copy_(torch.cat([part.flatten(0, 1) for part in parts]))
        self.proj.weight.copy_(weights.out_weight.flatten(1))
        if self.pairs is not None and weights.pairs is not None:
            self.pairs.copy_(weights.pairs)
        if has_biases(weights):  # where one part has a bias, those without have one of zeros
            biases = (weights.query_bias, weights.key_bias, weights.value_bias)
            given = [part[..., 0] * 0 if bias is None else bias for part, bias in zip(parts, biases)]
            self.qkv.bias.copy_(torch.cat([bias.flatten() for bias in given]))
        if weights.out_bias is not None:
            self.proj.bias.copy_(weights.out_bias)

    def _of_heads(self, x: Tensor) -> Tensor:
        """Return the kept heads' part of what may have something for each head of the host: [.., H, N, any]."""
        if self.kept_heads is None or x.dim() < 3 or x.shape[-3] != self.host_heads:
            return x
        return x.index_select(-3, self.kept_heads)

    def _rotated(self, query: Tensor, key: Tensor, named: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return queries and keys rotated by the layer's own tables, or by those that it is given."""
        rotary, cosines, sines = self.rotary, self.cosines, self.sines
        if rotary is not None and rotary.argument and named.get(rotary.tables[0]) is not None:
            values = [named[name] for name in rotary.tables]
            tables = cosines_and_sines(rotary, values, self.host_heads, self.head_width)
            cosines, sines = (self._of_heads(table) for table in tables)
        if rotary is None or cosines is None or sines is None:
            return query, key
        if self.pairs is not None:
            taken = dimensions_of(self.pairs, rotary.pairs, self.head_width)[:, None]  # [H, 1, R]
            cosines, sines = (table.expand(len(taken), -1, -1) for table in (cosines, sines))
            cosines, sines = (table.gather(2, taken.expand(-1, table.shape[1], -1)) for table in (cosines, sines))
        rotated_key, own = rotated(key, cosines, sines, rotary.pairs), (cosines, sines)
        if self.first is not None:  # of these the tables' first rows are, behind the tokens that stay as they are
            rows = max(0, self.first - key.shape[-2] + cosines.shape[-2])
            own = (cosines[..., :rows, :], sines[..., :rows, :])
        return rotated(query, *own, rotary.pairs), rotated_key

    def _added(self, mask: Tensor | None, key: Tensor, named: Mapping[str, Any]) -> Tensor | None:
        """Return what is added to the logits: a mask or bias that is given, and the layer's own bias."""
        if self.bias is not None and self.bias.argument and self.bias.table is not None:
            mask = named.get(self.bias.table, mask)
        if isinstance(mask, Tensor):  # and no placeholder of a program that is traced
            mask = self._of_heads(mask)[..., : self.first, :]
        if self.bias_table is None:
            return mask
        bias = bias_of_pairs(self.bias_table, self.bias_index, key.shape[-2])[None, :, : self.first].to(key.dtype)
        windows = None if self.bias is None or self.bias.mask is None else named.get(self.bias.mask)
        if windows is not None:
            by_window = bias + windows[:, None].to(bias)  # [windows, H, N, N]
            return by_window.expand(key.shape[0] // len(windows), *by_window.shape).flatten(0, 1)
        if mask is None:
            return bias
        return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask

    def heads_out(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **named: Any) -> Tensor:
        """Return the outputs of all heads side by side, [B, N, H V], which the output projection takes; of P tokens
        [B, P, H V] if it answers for so many.

        named: what else the layer is called with; tables of positions are among that.
        """
        rank = self.heads * self.query_key_rank
        if self.first is None:
            packed = self.qkv(x)
            queries, keys_and_values = packed[..., :rank], packed[..., rank:]
        else:
            queries, keys_and_values = self.query(x[:, : self.first]), self.key_value(x)
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (queries, keys_and_values[..., :rank], keys_and_values[..., rank:])
        )  # [B, H, N, R], twice, and [B, H, N, V]
        query, key = self._rotated(self.query_norm(query), self.key_norm(key), named)
        if self.cosine:
            query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        query = query if self.head_scales is None else query * self.head_scales.to(query.dtype)
        mask = self._added(attn_mask, key, named)
        # The CPU's fused attention wants equal widths; what is filled up with zeros changes nothing.
        if self.query_key_rank != self.value_rank and (isinstance(x, torch.fx.Proxy) or x.device.type == "cpu"):
            width = max(self.query_key_rank, self.value_rank)
            query, key = (F.pad(part, (0, width - self.query_key_rank)) for part in (query, key))
            value = F.pad(value, (0, width - self.value_rank))
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=self.scale
        )
        return self.out_norm(out[..., : self.value_rank].transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **kwargs: Any) -> Tensor:
        """x: [B, N, D]. Returns [B, N, D], zeros for tokens that it does not answer for."""
        out: Tensor = self.out_drop(self.proj(self.heads_out(x, attn_mask, is_causal, **kwargs)))
        return out if self.first is None else F.pad(out, (0, 0, 0, x.shape[1] - self.first))

    def answer_first(self, tokens: int) -> None:
        """Answer for so many tokens only, the first ones, in place: their queries look at the keys of all."""
        rank = self.heads * self.query_key_rank
        rows = torch.arange(self.qkv.out_features)
        self.query, self.key_value = (narrowed(self.qkv, part) for part in (rows[:rank], rows[rank:]))
        self.first = tokens
        del self.qkv

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Keep the windows that there are: timm's Swin says that they change, which the bias does not follow.

        Raises:
            GridError: they are others.
        """
        found = math.prod(window_size)
        if self.bias_index is not None and found**2 != len(self.bias_index):
            known = math.isqrt(len(self.bias_index))
            raise GridError(
                f"windows of {found} tokens are asked of narrow attention with a bias for {known}; "
                "set the input size of the dense model, then prune it"
            )

    def extra_repr(self) -> str:
        """Show heads and dimensions in the module's printed form."""
        first = "" if self.first is None else f", first={self.first}"
        return f"heads={self.heads}, query_key_rank={self.query_key_rank}, value_rank={self.value_rank}{first}"


def has_biases(weights: AttentionWeights) -> bool:
    """Return whether queries, keys or values have a bias."""
    return any(bias is not None for bias in (weights.query_bias, weights.key_bias, weights.value_bias))
