"""The budget as a loss term of a search."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spvit.budget import Budget
from spvit.search.gates import expected
from spvit.search.network import gated_layers, search_record

BUDGET_WEIGHT = 40.0


class BudgetLoss:
    """weight x (expected cost / dense cost - target share)^2 of a searchable network (paper section 3.4).

    On the relative cost one default weight serves every model size. Called without arguments it returns a scalar with
    gradients to the gate logits.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        macs: str | int | None = None,
        params: str | int | None = None,
        weight: float = BUDGET_WEIGHT,
        budget: Budget | None = None,
    ) -> None:
        """State the budget of a searchable network: `macs` or `params` as for `decide`, or one that is parsed already.

        weight: lambda against the relative cost.

        Raises:
            BudgetError: the budget is malformed, above the dense cost, or below what any architecture costs.
            NotSearchableError: the network has no gates.
        """
        budget = Budget.parse(macs, params) if budget is None else budget
        self.layers = gated_layers(net)
        self.cost = search_record(net).costs[budget.metric]
        self.target = budget.target(self.cost)
        self.weight = weight

    def expected_cost(self) -> Tensor:
        """Return the expected cost in MACs or parameters, a scalar with gradients to the gate logits."""
        # Cumulative as in the forward pass, but without its detaching: so the published code's gradients come out.
        opened = expected(torch.stack([attention.gate_logits.float() for attention, _ in self.layers]))
        attention = torch.cumprod(opened, dim=-1)
        units = [expected(ffn.gate_logits.float()).sum() for _, ffn in self.layers]
        return self.cost.expected(attention, units)

    def __call__(self) -> Tensor:
        """Return the loss, a scalar."""
        dense = self.cost.dense
        return self.weight * (self.expected_cost() / dense - self.target / dense) ** 2
