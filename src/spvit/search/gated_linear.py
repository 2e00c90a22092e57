"""The second linear layer of an FFN with gates on its hidden units."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from spvit.search.gates import INITIAL_LOGIT, GateDraws, is_open, straight_through


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
