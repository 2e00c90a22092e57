"""Linear layers with gates: on the hidden units of an FFN, and on the dimensions of an attention layer's heads.

The gates act on the weights, which is the same function as gating activations without a pass over them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spvit.gates import INITIAL_LOGIT, GateDraws, is_open, nest, opened, straight_through


class GatedLinear(nn.Module):
    """The second linear layer of an FFN with a gate on every hidden unit, that is on every column of its weight.

    `W2 (b * h) = (W2 * b) h`, so no pass over the activations is needed. Attributes: `linear`, the original layer;
    `gate_logits` [units].
    """

    def __init__(self, linear: nn.Linear, draws: GateDraws | None = None) -> None:
        super().__init__()
        self.linear = linear
        self.gate_logits = nn.Parameter(linear.weight.new_full((linear.in_features,), INITIAL_LOGIT))
        self.draws = draws if draws is not None else GateDraws()
        self.draws.join(self, read_bits=False)
        self.train(linear.training)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [..., units]. Returns [..., D]."""
        if self.training:
            gates = straight_through(self.gate_logits, self.draws.noise(self))
        else:
            gates = is_open(self.gate_logits)
        return F.linear(hidden, self.linear.weight * gates, self.linear.bias)


class RankGatedLinear(nn.Module):
    """The packed projection of attention with nested gates on how many dimensions of each head stay.

    Queries and values keep their first dimensions, as many as the gates say, the same in every head; what a removed
    dimension of the keys holds is multiplied by nothing. Meant for dimensions in the order of their use. Attributes:
    `linear`, the original layer, whose outputs are [queries, keys, values] of E dimensions a head; `gate_logits`
    [ranks - 1], since the smallest rank always stays.
    """

    groups: Tensor

    def __init__(self, linear: nn.Linear, heads: int, ranks: Sequence[int], draws: GateDraws | None = None) -> None:
        """Wrap a layer.

        Args:
            linear: [3 H E outputs].
            heads: H.
            ranks: what may stay of the E dimensions, ascending, the last one E.
            draws: of the network.
        """
        super().__init__()
        self.linear = linear
        self.heads, self.ranks = heads, tuple(ranks)
        self.gate_logits = nn.Parameter(linear.weight.new_full((len(self.ranks) - 1,), INITIAL_LOGIT))
        self.draws = draws if draws is not None else GateDraws()
        self.draws.join(self, read_bits=False)
        steps = torch.tensor([high - low for low, high in zip((0, *self.ranks), self.ranks)])
        groups = torch.arange(len(self.ranks)).repeat_interleave(steps).repeat(heads)
        self.register_buffer("groups", groups.to(linear.weight.device), persistent=False)  # of every dimension, [H E]
        self.train(linear.training)

    def decided(self) -> int:
        """Return the rank that the gates choose in evaluation."""
        return self.ranks[opened(self.draws.decided_bits(self))]

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D]. Returns [..., 3 H E]."""
        if self.training:
            gates = nest(straight_through(self.gate_logits, self.draws.noise(self)))
        else:
            gates = is_open(self.gate_logits).to(self.gate_logits.dtype).cumprod(-1)
        kept = torch.cat([gates.new_ones(1), gates])[self.groups]  # [H E]
        rows = torch.cat([kept, torch.ones_like(kept), kept])
        bias = None if self.linear.bias is None else self.linear.bias * rows
        return F.linear(x, self.linear.weight * rows[:, None], bias)
