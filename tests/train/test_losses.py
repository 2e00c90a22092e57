"""The loss terms of training beside the budget: the task, and distillation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spvit.train.losses import distillation_loss, task_loss
from tiny import assert_close


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_task_loss_with_class_indices(smoothing: float) -> None:
    scores, targets = _normal(5, 7, seed=0), torch.tensor([0, 6, 3, 3, 1])
    log_probabilities = torch.log_softmax(scores, dim=1)
    wanted = (1 - smoothing) * F.one_hot(targets, 7).double() + smoothing / 7
    assert_close(task_loss(scores, targets, smoothing), -(wanted * log_probabilities).sum(1).mean())


def test_task_loss_with_soft_targets_smooths_no_more() -> None:
    scores, targets = _normal(5, 7, seed=0), torch.softmax(_normal(5, 7, seed=1), dim=1)
    expected = -(targets * torch.log_softmax(scores, dim=1)).sum(1).mean()
    assert_close(task_loss(scores, targets, 0.1), expected)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_loss_is_the_divergence_at_a_temperature(temperature: float) -> None:
    student, teacher = _normal(5, 7, seed=0).requires_grad_(), _normal(5, 7, seed=1)
    p = torch.softmax(teacher / temperature, dim=1)
    q = torch.softmax(student / temperature, dim=1)
    loss = distillation_loss(student, teacher, temperature)
    assert_close(loss.detach(), (temperature**2 * (p * (p / q).log()).sum(1).mean()).detach())
    loss.backward()
    assert_close(student.grad, temperature * (q - p).detach() / 5)
    assert distillation_loss(teacher, teacher, temperature).abs() < 1e-12
