"""The loss terms of a step beside the budget's: task and distillation."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


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
