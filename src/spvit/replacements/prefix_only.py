"""The last block for its prefix tokens alone, where nothing behind it reads the others: exact, and far cheaper.

Queries, the output projection and the FFN run for the prefix tokens; keys and values come from all tokens. What the
layers would have added to the patch tokens is zeros, so that any block can go on with tokens of the shape that it had.

Shapes: B batch, N tokens = P prefix tokens + G grid tokens, X inputs and Y outputs of a linear layer.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from spvit.cost import AttentionCost
from spvit.hosts.calling import inside
from spvit.hosts.grid import Grid
from spvit.hosts.host import Host
from spvit.hosts.sites import AttentionSite
from spvit.replacements.install import put
from spvit.replacements.narrow import NarrowAttention


class PrefixOnly(nn.Module):
    """A linear layer of the prefix tokens alone; with a grid, zeros for its tokens follow.

    axis: of the tokens; 0 for [N, B, X].
    """

    def __init__(self, linear: nn.Linear, prefix_tokens: int, axis: int = 1, grid: Grid | None = None) -> None:
        super().__init__()
        self.linear, self.prefix_tokens, self.axis, self.grid = linear, prefix_tokens, axis, grid

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, X], or [B, P, X]. Returns [B, P, Y]; with a grid, [B, N, Y]."""
        out: Tensor = self.linear(x.narrow(self.axis, 0, self.prefix_tokens))
        if self.grid is None:
            return out
        behind = (0, self.grid.height * self.grid.width)
        return F.pad(out, (0, 0, *behind) if self.axis else (0, 0, 0, 0, *behind))

    def extra_repr(self) -> str:
        """Show how many tokens count in the module's printed form."""
        return f"prefix_tokens={self.prefix_tokens}"


def answer_prefix(host: Host, index: int, grid: Grid, undo: ExitStack) -> None:
    """Have a block of the host's model run for its prefix tokens alone, in place; its weights stay.

    Attention there is NarrowAttention or a skipped layer by now. grid: of the patches, kept at that of the images.
    """
    attention, ffn = host.blocks[index].attention, host.blocks[index].ffn
    module, prefix = inside(host.model.get_submodule(attention.path)), attention.prefix_tokens
    if isinstance(module, NarrowAttention):
        module.answer_first(prefix)
    axis = 0 if attention.token_first else 1
    for path in (*ffn.linears, ffn.second):
        linear = cast(nn.Linear, host.model.get_submodule(path))
        zeros = grid if path == ffn.second else None
        put(host.model, path, PrefixOnly(linear, prefix, axis, zeros).train(linear.training), undo)


def prefix_attention_cost(site: AttentionSite, metric: str, whole: AttentionCost) -> AttentionCost:
    """Return what attention costs for prefix tokens alone, from its cost for all tokens.

    MACs: a dimension of the queries is P D, of the keys N D, and of their product P N; of the values alike.
    """
    if metric == "macs":
        each = site.tokens * site.dim + site.prefix_tokens * (site.dim + site.tokens)
        return AttentionCost(2 * site.heads * site.head_width * each, each, each)
    head = whole.head + site.head_width * (whole.query_key + whole.value)
    return replace(whole, whole=whole.rest + site.heads * head)
