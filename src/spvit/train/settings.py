"""All settings of training: the attribute docstrings are the command line's help, and every value is checked here."""

import math
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from typing import Any

import torch

from spvit.errors import DataError
from spvit.repair.constraints import Constraints
from spvit.repair.objective import OBJECTIVES
from spvit.search.budget_loss import BUDGET_WEIGHT

TRACKERS = ("tensorboard", "wandb", "mlflow")
CALIBRATION_IMAGES = 1024
REPAIR_VIEWS = 4
LEARNING_RATE = 5e-4
MOST_RATE = 10.0  # far above any that trains; one above is a slip, and would train to nothing without a word
MOST_EPOCHS = 10_000  # where minutes are what ends training


def within(default: Any, low: float, high: float = math.inf, *, above: bool = False) -> Any:
    """Return a setting whose value, or each of its values, is at least `low` (or above it) and at most `high`."""
    return field(default=default, metadata={"range": (low, high, above)})


def one_of(default: str, *choices: str) -> Any:
    """Return a setting that takes one of some words."""
    return field(default=default, metadata={"choices": choices})


def check_settings(settings: Any, prefix: str = "") -> None:
    """Raise DataError naming the first setting that is out of its range, or none of its choices."""
    for own in fields(settings):
        name, value, choices = f"{prefix}{own.name}", getattr(settings, own.name), own.metadata.get("choices")
        if choices and value not in choices:
            raise DataError(f"{name} is {value!r}, expected {' or '.join(choices)}")
        if value is None or "range" not in own.metadata:
            continue
        low, high, above = own.metadata["range"]
        each = value if isinstance(value, (tuple, list)) else (value,)
        if not each or not all(
            math.isfinite(one) and low <= one <= high and not (above and one == low) for one in each
        ):
            least = "a finite number" if low == -math.inf else f"above {low}" if above else f"{low} or more"
            raise DataError(f"{name} is {value}, expected {least}{f', at most {high}' if high < math.inf else ''}")


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How images are read, augmented and batched."""

    batch_size: int = within(64, 1)
    """Images a step on each device."""
    accumulate: int = within(1, 1)
    """Such batches an optimizer step: their gradients add up, in the memory of one."""
    workers: int = within(0, 0)
    """Processes that read images beside the training process."""
    root: str = "data"
    """Folder of torchvision data sets, and of tar files from object stores: read from, or downloaded to."""
    download: bool = True
    """Whether a torchvision data set that is not under root may be downloaded."""
    held_out: int = within(0, 0)
    """Training images to validate on in place of the validation images (0: use the validation images)."""
    check: bool = True
    """Whether a run looks at the headers of all image files before it begins."""
    skip_corrupt: bool = False
    """Leave out images that cannot be read, in place of stopping."""
    most_unreadable: float = within(0.001, 0, 1)
    """Share of the images that skip_corrupt leaves out at most, of all files and in each epoch; more end the run."""
    background: float = within(1.0, 0, 1)
    """Shade that shows through transparent pixels, from 0 (black) to 1 (white)."""
    mean: tuple[float, ...] | None = within(None, 0, 1)
    """Mean of each channel (0 to 1); the model's own when absent."""
    std: tuple[float, ...] | None = within(None, 0, 1, above=True)
    """Standard deviation of each channel (0 to 1); the model's own when absent."""
    crop: float | None = within(None, 0, 1, above=True)
    """Share of the resized image's side that evaluation crops from its centre; the model's own when absent."""
    crop_scale: tuple[float, float] = within((0.35, 1.0), 0, 1, above=True)
    """Share of the image's area that a random training crop takes: least and most."""
    crop_ratio: tuple[float, float] = within((0.75, 1.3333), 0, above=True)
    """Width by height of a random training crop: least and most."""
    flip: float = within(0.5, 0, 1)
    """Probability of mirroring a training image left to right."""
    color_jitter: float = within(0.0, 0)
    """Strength of random changes of brightness, contrast and saturation (DeiT: 0.4)."""
    auto_augment: str | None = None
    """timm's automatic augmentation by name (DeiT: rand-m9-mstd0.5-inc1)."""
    random_erasing: float = within(0.0, 0, 1)
    """Probability of erasing a rectangle of a training image (DeiT: 0.25)."""
    mixup: float = within(0.0, 0)
    """Alpha of mixup, 0 for none (DeiT: 0.8)."""
    cutmix: float = within(0.0, 0)
    """Alpha of cutmix, 0 for none (DeiT: 1.0)."""
    repeated_augmentation: int = within(0, 0)
    """Times that an image stands in a step, augmented differently, over all devices; an epoch keeps its number of
    steps, with so many times fewer images (DeiT: 3). 0 for none."""

    def __post_init__(self) -> None:
        check_settings(self, "images.")
        for name, (least, most) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if least > most:
                raise DataError(f"images.{name} is [{least}, {most}], expected the least first, then the most")
        if (self.mixup > 0 or self.cutmix > 0) and self.batch_size % 2:
            raise DataError(f"images.batch_size is {self.batch_size}; mixup and cutmix need an even one")


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """Where models run."""

    device: str | None = None
    """Where the model runs: cpu, cuda, cuda:1, mps; when absent on the accelerator, or where there is none on the CPU.
    Of several processes each takes its own."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig(DeviceConfig):
    """Settings of a run that all its phases share."""

    seed: int = within(0, 0, 2**32 - 1)
    """Seed of everything random."""
    precision: str = one_of("auto", "auto", "fp32", "bf16")
    """`fp32`, or `bf16` for mixed precision; `auto` is fp32, but bf16 where views are kept (kept_views) and it makes
    a pass much faster."""
    compile: bool = False
    """Compile dense training and fine-tuning with torch.compile, which takes minutes at the start of each."""
    shard: bool = False
    """Of several processes each holds a part of the weights, gradients and moments (FSDP), for a model too large to
    train in one: in dense training and fine-tuning. Files stay as they are."""
    log_every: int = within(20, 1)
    """Steps between two lines of metrics.jsonl. At these the losses are fetched from the device, and looked at; several
    processes also see signals then."""
    save_minutes: float = within(10.0, 0)
    """Minutes between states within an epoch, which a killed run continues from; 0 saves at the ends of epochs only."""
    track: str | tuple[str, ...] | None = None
    """Trackers that get the same figures: tensorboard, wandb, mlflow; several with spaces or commas."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.shard and torch.__version__ < "2.8":
            raise DataError(f"shard needs torch 2.8 or newer, found {torch.__version__}; leave it out")
        for own in fields(self) if self.shard else ():
            phase = getattr(self, own.name)
            if isinstance(phase, PhaseConfig) and phase.optimizer == "muon":
                why = f"{own.name}.optimizer is 'muon', which takes whole matrices, but shard parts them"
                raise DataError(f"{why}; leave out one of the two")
        for tracker in self.trackers:
            if tracker not in TRACKERS:
                raise DataError(f"track is {tracker!r}, expected {', '.join(TRACKERS)}, or several of them")
            if find_spec(tracker) is None:
                raise DataError(f"track {tracker} needs a package; install it with: pip install {tracker}")

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names of the trackers, each once."""
        listed = self.track.replace(",", " ").split() if isinstance(self.track, str) else self.track or ()
        return tuple(dict.fromkeys(listed))


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """Settings of one phase of training."""

    epochs: int = within(10, 0)
    """Passes over the training images; 0 leaves the phase out."""
    minutes: float | None = within(None, 0, above=True)
    """Most minutes of the phase, counted anew by a continued run: then the epoch under way ends, and is the last."""
    optimizer: str = one_of("adamw", "adamw", "muon")
    """`adamw`, or `muon` (timm's): weight matrices move alike in all directions, other parameters as with AdamW."""
    learning_rate: float | None = within(None, 0, MOST_RATE)
    """Peak learning rate of the weights. When absent 5e-4; without labels, the highest that short trials gain by,
    which then falls to zero."""
    minimum_learning_rate: float = within(1e-5, 0, MOST_RATE)
    """Learning rate at the end of the cosine schedule; equal to the peak for a constant rate."""
    warmup_epochs: float = within(0.5, 0)
    """Epochs in which the learning rate rises from zero."""
    reference_batch: int = within(0, 0)
    """Scale learning rates by global batch size / this (DeiT: 512); 0 takes them as they are."""
    weight_decay: float = within(0.05, 0)
    """Weight decay, but none on biases, norms, and position, class and gate parameters."""
    label_smoothing: float = within(0.1, 0, 1)
    """Label smoothing of the task loss, 0 to 1."""
    clip_gradient: float = within(1.0, 0)
    """Largest gradient norm of the weights, 0 for no clipping."""
    distillation: float = within(0.0, 0, 1)
    """Share of the loss, 0 to 1, that compares with the teacher's outputs (DeiT: 0.5)."""
    distillation_kind: str = one_of("soft", "soft", "hard")
    """`soft`, the divergence from the teacher's outputs, or `hard`, the cross entropy with its first guess."""
    distillation_temperature: float = within(1.0, 0, above=True)
    """Temperature of soft distillation."""
    distillation_hidden: float | None = within(None, 0, 1)
    """Share of the loss, 0 to 1, that compares hidden states, the tokens that blocks take, with the dense model's:
    their error relative to their variance. When absent 0.99 without labels, and 0 with."""
    kept_views: int | None = within(None, 0)
    """Without labels: views of the training images, the same in each epoch, whose answers of the dense model are kept
    in memory, so that a step takes half as long or less. When absent, on a CPU and where at most 20 minutes, and no
    epochs, say how long: 800 by each minute, at most 4,096 and as many as 4 GiB hold. Else, and with 0, views are drawn
    anew."""
    teacher: str | None = None
    """The teacher: any timm model, hf:NAME or a folder that spvit wrote, with the same classes. Its images are
    normalised as its own, and resized when its input size is fixed. When absent, the dense model teaches."""
    averaging_epochs: float = within(0.0, 0)
    """Epochs that a running average of the weights reaches back; the average becomes the result. 0 for no average."""
    layer_decay: float = within(1.0, 0, 1, above=True)
    """Learning rate of each layer of a timm model by that of the next one (BEiT: 0.65); 1 for the same in all."""
    keep_best: bool = False
    """Keep the weights with the best validation accuracy, including those from before the phase."""
    patience: int = within(0, 0)
    """End after so many epochs without a better one, with keep_best; 0 goes on to the last."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.optimizer == "muon" and find_spec("timm.optim.muon") is None:
            raise DataError("optimizer is 'muon', which this timm does not have; pip install --upgrade timm")
        if self.teacher is not None and self.distillation == 0:
            why = f"the teacher is {self.teacher}, but distillation is 0"
            raise DataError(f"{why}; give its share of the loss, such as 0.5")
        if self.teacher is not None and self.distillation_hidden:
            why = f"distillation_hidden is {self.distillation_hidden}, which compares with the dense model"
            raise DataError(f"{why}, but the teacher is {self.teacher}; leave out one of the two")
        if self.patience > 0 and not self.keep_best:
            raise DataError(f"patience is {self.patience}, but no weights are kept to return to; give keep_best too")

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate, where none was found either."""
        return LEARNING_RATE if self.learning_rate is None else self.learning_rate


@dataclass(frozen=True, kw_only=True)
class SearchConfig(PhaseConfig):
    """Settings of the search."""

    gate_learning_rate: float | None = within(None, 0, MOST_RATE)
    """Constant learning rate of the gate logits, which do not decay. When absent, such that rate x
    steps is 12.5 as in the published DeiT search, but at most 0.05."""
    # A weight that is whole from the start closes gates by the dozen before the task has said which it needs
    # (docs/experiments/search-settings.md).
    budget_weight: float = within(2 * BUDGET_WEIGHT, 0)
    """Weight of the budget loss (lambda, on the relative cost) after its warm-up."""
    budget_warmup: float = within(1.0, 0, 1)
    """Share of the search, 0 to 1, in which the weight of the budget loss rises linearly from zero."""
    gate_logit: float = within(1.5, -math.inf)
    """Initial gate logits (theta)."""
    temperature: float | None = within(None, 0, above=True)
    """Temperature of the published head mix (alpha); the family's own when absent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_best:
            raise DataError("keep_best is on for the search, whose most accurate weights are those with all gates open")


@dataclass(frozen=True, kw_only=True)
class ScoresConfig(Constraints, LoopConfig):
    """Settings of scores, decisions by them and repairs, and what the decisions leave alone."""

    calibration_images: int = within(CALIBRATION_IMAGES, 1)
    """Training images for scores, cropped and mirrored at random; fewer are cropped anew. Labels are not used."""
    repair_views: int = within(REPAIR_VIEWS, 1)
    """Times that number of images for the repair: further training images, and all of them again, cropped anew, where
    there are no more."""
    scores: str | None = None
    """A run folder whose scores to decide by, for another budget; when absent the model is scored."""
    objective: str = one_of("auto", *OBJECTIVES)
    """What counts of the model's outputs in scores: `logits`, `pooled` (its output), `tokens` (behind the last norm) or
    `features` (both); `auto` is logits where it has classes, or what given scores were made with."""
    multiple: int | None = None
    """FFN widths and ranks of attention are multiples of it; when absent 8, or less for very small models."""
    latency_batch: int = within(1, 1)
    """Images in one pass where a latency budget is measured: on the device of the run, in single precision."""

    def __post_init__(self) -> None:
        Constraints.__post_init__(self)
        LoopConfig.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class FrontierConfig(ScoresConfig):
    """Settings of a frontier."""

    repair_views: int = within(1, 1)
    """Times the calibration images for the repair of each budget: less than `compress` takes, for one time each."""
    batches: tuple[int, ...] = within((1, 8), 1)
    """Batch sizes at which latency is measured; on an accelerator a larger one tells more."""


@dataclass(frozen=True, kw_only=True)
class CompressConfig(ScoresConfig):
    """Settings of a whole compression, and what its decision leaves alone."""

    dense: PhaseConfig = field(default_factory=lambda: PhaseConfig(epochs=0))
    """Training of the dense model beforehand, for a model that is not trained on these images yet."""
    search: SearchConfig = field(default_factory=lambda: SearchConfig(epochs=0))
    """The search for what to keep; with 0 epochs scores decide, without training."""
    finetune: PhaseConfig = field(
        # A constant rate explores and the average from the repaired weights on gathers, at any length; a schedule that
        # ends low gains less, a short one may lose (docs/experiments/fine-tuning.md).
        default_factory=lambda: PhaseConfig(
            minimum_learning_rate=5e-4, warmup_epochs=0.2, distillation=0.5, averaging_epochs=1.0, keep_best=True
        )
    )
    """Training of the pruned model."""
    epochs: int | None = within(None, 0)
    """Epochs of fine-tuning, in place of those of `finetune`; 0 trains nothing, and so allows no search."""
    minutes: float | None = within(None, 0, above=True)
    """Most minutes of fine-tuning, in place of those of `finetune`; as many epochs as they have room for, unless
    epochs says how many."""
    repair: bool = True
    """Whether what pruning broke is repaired in closed form, from calibration images."""
    initialise: str = "host"
    """Weights of the pruned model after a search: those of the `host`, as published (and then repaired), or of the
    `search`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.given() and self.search.epochs > 0:
            found = "; ".join(self.given().values())
            raise DataError(f"{found}: these bind decisions by scores; leave them out, or search.epochs")
        if self.initialise not in ("search", "host"):
            raise DataError(f"initialise is {self.initialise!r}, expected search or host")
        if self.scores is not None and (self.search.epochs > 0 or self.dense.epochs > 0):
            why = f"scores {self.scores} are of the model as it is, and decide without a search"
            raise DataError(f"{why}; leave them out, or dense.epochs and search.epochs")
        if self.epochs == 0 and self.search.epochs > 0:
            searched = f"search.epochs is {self.search.epochs}"
            raise DataError(f"nothing is to be trained, but {searched}; leave one of the two out")

    @property
    def finetuning(self) -> PhaseConfig:
        """The settings of `finetune`, with the epochs and minutes of the run where these are given."""
        epochs = MOST_EPOCHS if self.epochs is None and self.minutes is not None else self.epochs
        given: dict[str, Any] = {"epochs": epochs, "minutes": self.minutes}
        return replace(self.finetune, **{name: value for name, value in given.items() if value is not None})
