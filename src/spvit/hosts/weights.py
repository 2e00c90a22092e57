"""The weights of a standard attention layer, read by the names that its site gives: the one carrier of them.

Shapes: D width, H heads, E head width, R dimensions of queries and keys, V of values (both E in a dense layer).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from spvit.hosts.sites import AttentionSite, Rows


@dataclass(frozen=True)
class AttentionWeights:
    """Weights of an attention layer, split by head; None: the layer has no such part. Gradients flow to the host.

    query_weight, key_weight: [H, R, D]; query_bias, key_bias: [H, R]; value_weight: [H, V, D]; value_bias: [H, V];
    out_weight: [D, H, V]; out_bias: [D].
    """

    query_weight: Tensor
    query_bias: Tensor | None
    key_weight: Tensor
    key_bias: Tensor | None
    value_weight: Tensor
    value_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    pairs: Tensor | None = None
    """Pairs of rotating dimensions that narrower queries and keys keep, [H, R / 2]; None: all."""


def read_weights(layer: nn.Module, site: AttentionSite) -> AttentionWeights:
    """Return the weights of a dense attention layer; those that lie together are views of its parameters."""
    by_head = (site.heads, site.head_width)
    out_bias = None if site.out.bias is None else layer.get_parameter(site.out.bias)
    return AttentionWeights(
        *read_rows(layer, site.query, by_head),
        *read_rows(layer, site.key, by_head),
        *read_rows(layer, site.value, by_head),
        taken(layer.get_parameter(site.out.weight), site.out, by_head, 1),
        out_bias,
    )


def read_rows(layer: nn.Module, rows: Rows, by_head: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Return the weight [H, E, D] and the bias [H, E] of one projection. by_head: (H, E)."""
    weight = layer.get_parameter(rows.weight)
    own = taken(weight, rows, by_head, 0)
    if rows.bias is None:
        return own, None
    bias = layer.get_parameter(rows.bias)
    return own, taken(bias, rows, by_head, 0) if len(bias) == len(weight) else bias.unflatten(0, by_head)


def taken(parameter: Tensor, rows: Rows, by_head: tuple[int, int], axis: int) -> Tensor:
    """Return the rows (axis 0) or columns (axis 1 or -1) of all heads, with that axis as [H, E]."""
    heads, width = by_head
    if rows.by_dim == 1 and rows.by_head in (None, width):
        return parameter.narrow(axis, rows.start, heads * width).unflatten(axis, by_head)
    indices = rows.indices(heads, width).flatten().to(parameter.device)
    return parameter.index_select(axis, indices).unflatten(axis, by_head)
