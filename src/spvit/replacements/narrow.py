"""Attention with fewer heads or dimensions: queries and keys of a lower rank, values of fewer dimensions.

Both rotate first: what the kept dimensions hold is chosen among all directions, and the rotation is folded into the
projections, so nothing is added to the forward pass. Queries and keys keep the low-rank part of their logits that is
best in the mean square (weighted truncated singular value decomposition); values keep the directions that the output
projection uses most, whitened by how the head's outputs vary (as in whitened truncation of linear layers).

Shapes: B batch, N tokens, D width, H heads, E head width, R query/key dimensions and V value dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spvit.architecture import Attention, Rules
from spvit.cost import AttentionCost, count_params
from spvit.hosts.calling import called_with
from spvit.hosts.grid import Grid
from spvit.hosts.host import Host
from spvit.hosts.position import bias_of_pairs, cosines_and_sines, entries_by_head, inside_layer, rotated
from spvit.hosts.sites import AttentionSite
from spvit.hosts.walk import BlockPair
from spvit.hosts.weights import AttentionWeights, read_weights
from spvit.moments import Moments, regression, ridge_for
from spvit.replacements.ffn import narrow_linear
from spvit.replacements.rotation import narrow_blindly, narrow_heads, narrow_values, value_directions
from spvit.replacements.targets import targets


class NarrowAttention(nn.Module):
    """Attention with fewer heads or dimensions than the layer it replaces: one packed projection, fused attention.

    Takes the arguments of that layer; a mask is added to the logits. The softmax keeps the original layer's scale.
    Where the places of tokens act on queries, keys or logits, so they do here: `bias_table` [entries, H] is learned.

    Attributes: `first`, how many of the tokens, the first ones, it answers for (`answer_first`); None: all of them.
    """

    first: int | None = None
    query: nn.Linear
    key_value: nn.Linear

    kept_heads: Tensor | None
    cosines: Tensor | None
    sines: Tensor | None
    bias_index: Tensor | None
    bias_table: nn.Parameter | None

    def __init__(self, layer: nn.Module, site: AttentionSite, kept: Attention) -> None:
        """Make room for what is kept of the dense layer at a site; its weights are loaded next."""
        super().__init__()
        weights = read_weights(layer, site)
        like: dict[str, Any] = {"device": weights.value_weight.device, "dtype": weights.value_weight.dtype}
        self.heads = site.heads if kept.heads is None else len(kept.heads)
        self.query_key_rank = site.head_width if kept.query_key_rank is None else kept.query_key_rank
        self.value_rank = site.head_width if kept.value_rank is None else kept.value_rank
        self.scale, self.dropout = site.scale, site.dropout
        rows, biased = self.heads * (2 * self.query_key_rank + self.value_rank), _biased(weights)
        self.qkv = nn.utils.skip_init(nn.Linear, site.dim, rows, bias=biased, **like)
        self.query_norm, self.key_norm, self.out_norm = (
            nn.Identity() if name is None else layer.get_submodule(name) for name in site.norms
        )
        columns, biased = self.heads * self.value_rank, weights.out_bias is not None
        self.proj = nn.utils.skip_init(nn.Linear, columns, site.dim, bias=biased, **like)
        self.out_drop = nn.Dropout(site.out_dropout)
        self._place(layer, site, None if kept.heads is None else torch.tensor(kept.heads, device=like["device"]))

    def _place(self, layer: nn.Module, site: AttentionSite, kept_heads: Tensor | None) -> None:
        """Take over what the places of tokens do in the dense layer, for the kept heads (None: all)."""
        self.rotary, self.bias = site.rotary, site.bias
        self.host_heads, self.head_width = site.heads, site.head_width
        self.register_buffer("kept_heads", kept_heads, persistent=False)
        cosines = sines = index = table = None
        if site.rotary is not None and not site.rotary.argument:
            values = [inside_layer(layer, name) for name in site.rotary.tables]
            tables = cosines_and_sines(site.rotary, values, site.heads, site.head_width)
            cosines, sines = (self._of_heads(table) for table in tables)
        if site.bias is not None and not site.bias.argument:
            entries = entries_by_head(site.bias, layer.get_parameter(site.bias.table), site.heads).detach()
            table = nn.Parameter((entries if kept_heads is None else entries[:, kept_heads]).clone())
            index = None if site.bias.index is None else inside_layer(layer, site.bias.index).flatten()
        for name, buffer in (("cosines", cosines), ("sines", sines), ("bias_index", index)):
            self.register_buffer(name, buffer, persistent=False)
        self.register_parameter("bias_table", table)

    @torch.no_grad()
    def load(self, weights: AttentionWeights) -> None:
        """Take over weights of the layer's own shapes, in place."""
        parts = (weights.query_weight, weights.key_weight, weights.value_weight)
        self.qkv.weight.copy_(torch.cat([part.flatten(0, 1) for part in parts]))
        self.proj.weight.copy_(weights.out_weight.flatten(1))
        if _biased(weights):  # where one part has a bias, those without have one of zeros
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
        rotated_key, own = rotated(key, cosines, sines, rotary.pairs), (cosines, sines)
        if self.first is not None:  # of these the tables' first rows are, behind the tokens that stay as they are
            rows = max(0, self.first - key.shape[-2] + cosines.shape[-2])
            own = (cosines[..., :rows, :], sines[..., :rows, :])
        return rotated(query, *own, rotary.pairs), rotated_key

    def _added(self, mask: Tensor | None, key: Tensor, named: Mapping[str, Any]) -> Tensor | None:
        """Return what is added to the logits: a mask or bias that is given, and the layer's own bias."""
        if self.bias is not None and self.bias.argument:
            mask = named.get(self.bias.table, mask)
        mask = None if mask is None else self._of_heads(mask)[..., : self.first, :]
        if self.bias_table is None:
            return mask
        bias = bias_of_pairs(self.bias_table, self.bias_index, key.shape[-2])[None, :, : self.first].to(key.dtype)
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
        self.query, self.key_value = (narrow_linear(self.qkv, part, 0) for part in (rows[:rank], rows[rank:]))
        self.first = tokens
        del self.qkv

    def extra_repr(self) -> str:
        """Show heads and dimensions in the module's printed form."""
        first = "" if self.first is None else f", first={self.first}"
        return f"heads={self.heads}, query_key_rank={self.query_key_rank}, value_rank={self.value_rank}{first}"


class _Narrow:
    """The kind `msa`: the layer as it was, or narrower."""

    def forms(self, site: AttentionSite) -> Iterator[Attention]:
        """Yield the whole layer; `repair.errors` knows the narrower ones, since it says which heads to keep."""
        yield Attention()

    def make(
        self,
        layer: nn.Module,
        site: AttentionSite,
        kept: Attention,
        rules: Rules,
        grid: Grid,
        fitted: bool = False,
        tokens: str = "all",
        **hints: Any,
    ) -> nn.Module:
        """Whole, it is the layer itself; narrow, from its weights alone, as if its inputs were white noise.

        Whole for prefix tokens alone, it has the layer's weights.
        """
        if not kept.narrowed() and tokens == "all":
            return layer
        module = NarrowAttention(layer, site, kept)
        if not fitted or not kept.narrowed():
            module.load(narrow_blindly(read_weights(layer, site), kept))
        return module

    def fit(self, module: nn.Module, pair: BlockPair, kept: Attention) -> None:
        """Rotate queries and keys, then values, by how they vary; fit the output projection to its targets."""
        if not isinstance(module, NarrowAttention):
            return
        weights, moments = rotated_queries(pair, kept, inputs_of_attention(pair))
        rotation = torch.eye(moments.inputs, dtype=torch.float64, device=moments.mean_x.device)
        if kept.value_rank is not None:
            covariances = own_covariances(moments, len(weights.query_weight))
            weights, by_head = narrow_values(weights, value_directions(weights, covariances), kept, covariances)
            rotation = torch.block_diag(*by_head)
        biased = module.proj.bias is not None
        covariance, cross = moments.products(biased)
        prior = weights.out_weight.flatten(1).double()
        out = fitted_output(prior, rotation @ covariance @ rotation.T, rotation @ cross, moments)
        bias = (moments.mean_y - out @ rotation @ moments.mean_x).to(prior) if biased else None
        module.load(replace(weights, out_weight=out.view(weights.out_weight.shape), out_bias=bias))

    def cost(self, host: Host, site: AttentionSite, metric: str) -> AttentionCost:
        """MACs: projections, and two products of [tokens, keys, H E] (paper section 3.4)."""
        layer = host.model.get_submodule(site.path)
        if metric == "macs":
            attending = site.windows * site.keys
            linear = 4 * site.heads * site.head_width * site.dim
            products = 2 * attending * site.keys * site.heads * site.head_width
            each = site.tokens * (2 * site.dim + site.keys)
            return AttentionCost(attending * linear + products, each, each)
        norm = 0 if site.norm is None else count_params(host.model.get_submodule(site.norm))
        weights = read_weights(layer, site)
        biased, own_norms = int(_biased(weights)), (name for name in site.norms if name is not None)
        rest = host.norm_params(site) + sum(count_params(layer.get_submodule(name)) for name in own_norms)
        rest += 0 if weights.out_bias is None else site.dim
        bias = site.bias
        head = 0 if bias is None or bias.argument else layer.get_parameter(bias.table).numel() // site.heads
        return AttentionCost(norm + count_params(layer), 2 * (site.dim + biased), 2 * site.dim + biased, rest, head)


REPLACEMENT = _Narrow()


def _biased(weights: AttentionWeights) -> bool:
    """Return whether queries, keys or values have a bias."""
    return any(bias is not None for bias in (weights.query_bias, weights.key_bias, weights.value_bias))


def fitted_output(prior: Tensor, covariance: Tensor, cross: Tensor, moments: Moments) -> Tensor:
    """Return the output projection [D, X] that comes closest to the targets from narrow heads, drawn towards a prior.

    covariance: of the narrow heads' outputs side by side, [X, X]; cross: with the targets, [X, D]; both from the
    moments, which say how many tokens there were. The repair and the estimate of what is missed share this formula.
    """
    return prior + regression(covariance, cross - covariance @ prior.T, ridge_for(moments, len(covariance))).T


def inputs_of_attention(pair: BlockPair) -> Tensor:
    """Return the second moment about zero of what arrives at an attention layer with a one appended, [D + 1, D + 1]."""
    arriving = Moments()
    for x in pair.arriving(pair.sites.attention.path):
        arriving.add(torch.cat([x, torch.ones_like(x[..., :1])], dim=-1), prefix=pair.prefix)
    return arriving.second_x


def rotated_queries(pair: BlockPair, kept: Attention, second_moment: Tensor) -> tuple[AttentionWeights, Moments]:
    """Return the kept heads with queries and keys at the kept rank, and the moments of their outputs and the targets.

    The heads' outputs, of whole values, are side by side [H E]. second_moment: as `inputs_of_attention` returns it.
    """
    site = pair.sites.attention
    layer = pair.host.model.get_submodule(site.path)
    weights = narrow_heads(pair.host.weights(pair.index), kept, second_moment)
    whole = NarrowAttention(layer, site, replace(kept, value_rank=None)).eval()
    whole.load(weights)
    moments = Moments()
    with called_with(pair.model.get_submodule(site.path), site) as named:
        for x, wanted in zip(pair.arriving(site.path), targets(pair, site.path)):
            moments.add(whole.heads_out(x, **named), wanted, pair.prefix)
    return weights, moments


def own_covariances(moments: Moments, heads: int) -> Tensor:
    """Return the covariance of each head's outputs, [H, E, E], from moments of all side by side, [H E]."""
    by_head = moments.covariance.unflatten(0, (heads, -1)).unflatten(2, (heads, -1))  # [H, E, H, E]
    return by_head.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
