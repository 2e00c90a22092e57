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


def read_weights(layer: nn.Module, site: AttentionSite) -> AttentionWeights:
    """Return the weights of a dense attention layer as views of its parameters."""
    by_head = (site.heads, site.head_width)

    def rows(part: Rows) -> tuple[Tensor, Tensor | None]:
        linear = layer.get_submodule(part.linear)
        assert isinstance(linear, nn.Linear)
        own = slice(part.start, part.start + site.heads * site.head_width)
        bias: Tensor | None = linear.bias
        return linear.weight[own].unflatten(0, by_head), None if bias is None else bias[own].unflatten(0, by_head)

    out = layer.get_submodule(site.out)
    assert isinstance(out, nn.Linear)
    return AttentionWeights(
        *rows(site.query), *rows(site.key), *rows(site.value), out.weight.unflatten(1, by_head), out.bias
    )
