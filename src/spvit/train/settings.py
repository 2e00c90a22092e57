"""Settings of a run and its phases; the attribute docstrings are the command line's help."""

import math
from dataclasses import dataclass

from spvit.errors import DataError
from spvit.search.budget_loss import BUDGET_WEIGHT

KINDS_OF_DISTILLATION = ("soft", "hard")
LARGEST_SEED = 2**32


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings of a run that all its phases share."""

    seed: int = 0
    """Seed of everything random."""
    precision: str = "fp32"
    """`fp32`, or `bf16` for mixed precision."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        """Raise DataError when a value is out of range."""
        if not 0 <= self.seed < LARGEST_SEED:
            raise DataError(f"seed is {self.seed}, expected 0 or more, below {LARGEST_SEED}")
        if self.precision not in ("fp32", "bf16"):
            raise DataError(f"precision is {self.precision!r}, expected fp32 or bf16")
        if self.log_every < 1:
            raise DataError(f"log_every is {self.log_every}, expected 1 or more")


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """Settings of one phase of training."""

    epochs: int = 10
    """Passes over the training images; 0 leaves the phase out."""
    learning_rate: float = 5e-4
    """Peak learning rate of the weights (AdamW)."""
    minimum_learning_rate: float = 1e-5
    """Learning rate at the end of the cosine schedule; equal to the peak for a constant rate."""
    warmup_epochs: float = 0.5
    """Epochs in which the learning rate rises from zero."""
    reference_batch: int = 0
    """Scale learning rates by global batch size / this (DeiT: 512); 0 takes them as they are."""
    weight_decay: float = 0.05
    """Weight decay, but none on biases, norms, and position, class and gate parameters."""
    label_smoothing: float = 0.1
    """Label smoothing of the task loss, 0 to 1."""
    clip_gradient: float = 1.0
    """Largest gradient norm of the weights, 0 for no clipping."""
    distillation: float = 0.0
    """Share of the loss, 0 to 1, that compares with the teacher's outputs (DeiT: 0.5)."""
    distillation_kind: str = "soft"
    """`soft`, the divergence from the teacher's outputs, or `hard`, the cross entropy with its first guess."""
    distillation_temperature: float = 1.0
    """Temperature of soft distillation."""
    teacher: str | None = None
    """The teacher: any timm model, hf:NAME or a folder that spvit wrote, with the same classes. Its images are
    normalised as its own, and resized when its input size is fixed. When absent, the dense model teaches."""
    averaging_epochs: float = 0.0
    """Epochs that a running average of the weights reaches back; the average becomes the result. 0 for no average."""
    keep_best: bool = False
    """Keep the weights with the best validation accuracy, including those from before the phase."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig(PhaseConfig):
    """Settings of the search."""

    gate_learning_rate: float | None = None
    """Constant learning rate of the gate logits (an AdamW of their own, without decay). When absent, such that rate x
    steps is 12.5 as in the published DeiT search, but at most 0.05."""
    # A weight that is whole from the start closes gates by the dozen before the task has said which it needs
    # (docs/experiments/search-settings.md).
    budget_weight: float = 2 * BUDGET_WEIGHT
    """Weight of the budget loss (lambda, on the relative cost) after its warm-up."""
    budget_warmup: float = 1.0
    """Share of the search, 0 to 1, in which the weight of the budget loss rises linearly from zero."""
    gate_logit: float = 1.5
    """Initial gate logits (theta)."""
    temperature: float | None = None
    """Temperature of the published head mix (alpha); the family's own when absent."""


def check_settings(settings: PhaseConfig) -> None:
    """Raise DataError naming the first setting that is out of range."""
    ranges: list[tuple[str, float, float]] = [
        ("epochs", 0, math.inf),
        ("learning_rate", 0, math.inf),
        ("label_smoothing", 0, 1),
        ("distillation", 0, 1),
        ("clip_gradient", 0, math.inf),
        ("weight_decay", 0, math.inf),
        ("averaging_epochs", 0, math.inf),
    ]
    if isinstance(settings, SearchConfig):
        ranges += [("budget_weight", 0, math.inf), ("budget_warmup", 0, 1)]
    for name, low, high in ranges:
        value = getattr(settings, name)
        if not low <= value <= high:
            raise DataError(f"{name} is {value}, expected {low} or more" + (f", at most {high}" if high == 1 else ""))
    if isinstance(settings, SearchConfig) and settings.keep_best:
        raise DataError("keep_best is on for the search, whose most accurate weights are those with all gates open")
    if settings.distillation_kind not in KINDS_OF_DISTILLATION:
        raise DataError(f"distillation_kind is {settings.distillation_kind!r}, expected soft or hard")
    if settings.teacher is not None and settings.distillation == 0:
        raise DataError(
            f"the teacher is {settings.teacher}, but distillation is 0; give its share of the loss, such as 0.5"
        )
