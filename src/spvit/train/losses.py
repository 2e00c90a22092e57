"""The loss terms: task, distillation from a dense model, and the budget."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spvit.budget import parse_budget
from spvit.gates import expected
from spvit.surgery import gated_layers, search_record

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
    ) -> None:
        """State the budget.

        Args:
            net: what `make_searchable` returned.
            macs: `"50%"` of the host's cost, `"1.0G"` or a whole number of MACs of one image.
            params: the same in parameters; give exactly one of the two.
            weight: lambda against the relative cost.

        Raises:
            BudgetError: the budget is malformed, above the dense cost, or below what any architecture costs.
            NotSearchableError: the network has no gates.
        """
        budget = parse_budget(macs, params)
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


def task_loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Return the cross entropy of logits [B, classes] with class indices [B] or soft targets [B, classes]."""
    return F.cross_entropy(logits, targets, label_smoothing=smoothing if targets.dim() == 1 else 0.0)


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return the KL divergence of student from teacher at a temperature, times its square. Both [B, classes]."""
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def hard_distillation_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the cross entropy of the student with the teacher's first guess, as DeiT distils. Both [B, classes]."""
    return F.cross_entropy(logits, teacher_logits.argmax(dim=1))
