"""The one training loop, on Accelerate: dense training, search and fine-tuning are phases of it.

A phase supplies the model, its settings and its extra losses. Every epoch starts from a seed of its own (run, phase,
epoch), and the state is saved at its end, so a continued run repeats exactly what an uninterrupted one does.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import set_seed
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spvit.architecture import KINDS
from spvit.checkpoint import fit_state
from spvit.errors import DataError, RunError
from spvit.hosts.host import logits_of
from spvit.search.budget_loss import BudgetLoss
from spvit.search.network import gate_parameters
from spvit.train.data import Images, mixup_of
from spvit.train.loaders import UNREAD, repeated_loader, training_loader, validation_loader
from spvit.train.losses import distillation_loss, hard_distillation_loss, task_loss
from spvit.train.optimizers import load_tensors, optimizers, tensors_of
from spvit.train.processes import processes
from spvit.train.progress import PhaseProgress
from spvit.train.run_folder import RunFolder
from spvit.train.settings import LoopConfig, PhaseConfig, check_settings
from spvit.train.teacher import open_teacher


@dataclass(frozen=True)
class Run:
    """What the phases of a run share."""

    images: Images
    folder: RunFolder
    config: LoopConfig
    progress: PhaseProgress = field(default_factory=PhaseProgress)


@dataclass
class Phase:
    """What the loop trains: a model, its settings, and the losses beside the task's."""

    name: str
    model: nn.Module
    config: PhaseConfig
    budget: BudgetLoss | None = None
    teacher: nn.Module | None = None
    """The teacher of distillation; when absent the one that the settings name is opened."""


@dataclass(frozen=True)
class Evaluation:
    """How well a model does on the validation images."""

    accuracy: float
    """Share of images, 0 to 1, whose class is the first guess."""
    accuracy_top5: float
    """Share of images, 0 to 1, whose class is among the first five guesses."""
    loss: float
    """Mean cross entropy."""
    images: int
    """Number of images."""


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader[Any], accelerator: Accelerator, precision: str = "fp32"
) -> Evaluation:
    """Return a model's figures over a loader, across all processes. The model's training flag survives."""
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for images, targets in loader:
        with autocast(accelerator.device, precision):
            logits = logits_of(model(images)).float()
        losses = nn.functional.cross_entropy(logits, targets, reduction="none", ignore_index=UNREAD)
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        read = (targets != UNREAD).float()
        figures = torch.stack([ranked[:, 0].float(), ranked.any(1).float(), losses, read], dim=1)
        sums += accelerator.gather_for_metrics(figures).cpu().double().sum(0)
    model.train(was_training)
    first, five, loss, count = sums.tolist()
    count = max(count, 1.0)
    return Evaluation(first / count, five / count, loss / count, int(count))


def make_accelerator() -> Accelerator:
    """Return the Accelerator of a run: any device, any number of processes."""
    processes()
    # Accelerate keeps one precision a process, but a later run may ask for another: autocast is ours.
    return Accelerator(mixed_precision="no")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context of a forward pass: `fp32` as it is, `bf16` in mixed precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def prepared_loader(images: Images, accelerator: Accelerator) -> Any:
    """Return the loader of this process's training images on its device. Its length is the steps of an epoch."""
    if images.config.repeated_augmentation <= 1:
        return accelerator.prepare(training_loader(images))
    # The sampler shares out the images itself: the repeats of one go to different processes.
    loader = repeated_loader(images, accelerator.num_processes, accelerator.process_index)
    return prepare_data_loader(loader, accelerator.device, 1, 0, put_on_device=True)


def run_phase(phase: Phase, run: Run) -> Evaluation:
    """Train a phase's model in place, from the last saved state if the folder has one; return its final figures.

    Raises:
        RunError: the loss is not finite; the last saved state stays.
        DataError: a setting is out of range, or an image cannot be read.
    """
    return Loop(phase, run).run()


class Loop:
    """A phase under way: its parts on their devices, and one step after another."""

    def __init__(self, phase: Phase, run: Run) -> None:
        check_settings(phase.config)
        self.phase, self.settings = phase, phase.config
        self.folder, self.config, self.progress = run.folder, run.config, run.progress
        self.accelerator = make_accelerator()
        self.mixup = mixup_of(run.images.config, len(run.images.classes), phase.config.label_smoothing)
        self.train = prepared_loader(run.images, self.accelerator)
        self.total = max(1, phase.config.epochs * len(self.train))
        weights, gates = optimizers(phase.model, phase.config, phase.budget is not None, self.total)
        prepare = self.accelerator.prepare
        self.model, self.validation, self.weights = prepare(phase.model, validation_loader(run.images), weights)
        self.gates = prepare(gates) if gates is not None else None
        teacher = phase.teacher if phase.config.distillation > 0 else None
        if teacher is None and phase.config.teacher is not None:
            teacher = open_teacher(phase.config.teacher, run.images)
        if teacher is None and phase.config.distillation > 0:
            raise DataError(
                f"{phase.name}.distillation is {phase.config.distillation}, but there is no teacher; name a teacher "
                f"with --{phase.name}.teacher, or leave distillation out"
            )
        self.teacher = teacher.to(self.accelerator.device).eval() if teacher is not None else None
        self.batch = run.images.config.batch_size * self.accelerator.num_processes
        self.scale = self.batch / phase.config.reference_batch if phase.config.reference_batch else 1.0
        self.average: Any = None
        if phase.config.averaging_epochs > 0:
            # After so many epochs as the average reaches back, 1/e of it is left of where it started.
            decay = math.exp(-1 / (phase.config.averaging_epochs * len(self.train)))
            self.average = ModelEmaV3(self._plain(), decay=decay)

    def _plain(self) -> nn.Module:
        plain: nn.Module = self.accelerator.unwrap_model(self.model)
        return plain

    def _judged(self) -> nn.Module:
        """Return the model that is evaluated, and whose weights are kept: the average if there is one."""
        return cast(nn.Module, self.average.module) if self.average is not None else self.model

    def run(self) -> Evaluation:
        """Train from the last saved state to the end and return the final figures."""
        done, figures = self._resume()
        epochs = self.settings.epochs
        if done == 0 and self.settings.keep_best:
            figures = self._evaluate()
            self._offer(0, figures)
        with self.progress.bar(self.phase.name, epochs * len(self.train), done * len(self.train)):
            for epoch in range(done, epochs):
                self._epoch(epoch)
                figures = self._evaluate()
                self._offer(epoch + 1, figures)
                standing = self._standing()
                self._record({"event": "evaluation", "epoch": epoch + 1, **vars(figures), **standing})
                self._save(epoch + 1, figures)
                self.progress.stand(standing)
                self.progress.epoch(epoch + 1, epochs, figures.accuracy)
        if figures is None:
            figures = self._evaluate()
        plain = self._plain()
        if self.average is not None:
            plain.load_state_dict(self.average.module.state_dict())
        best = self.folder.best(self.phase.name) if self.settings.keep_best else None
        if best is not None and best["accuracy"] > figures.accuracy:
            fit_state(plain, self.folder.best_weights(self.phase.name), "of the best weights")
            figures = evaluate(plain, self.validation, self.accelerator, self.config.precision)
            which = f"epoch {best['epoch']}" if best["epoch"] > 0 else "what it started from"
            self.progress.note(f"{self.phase.name}: {which} was the best on the validation images and is kept")
        self.accelerator.free_memory()
        return figures

    def _evaluate(self) -> Evaluation:
        return evaluate(self._judged(), self.validation, self.accelerator, self.config.precision)

    def _offer(self, epoch: int, figures: Evaluation) -> None:
        if self.settings.keep_best and self.accelerator.is_main_process:
            judged = self.accelerator.unwrap_model(self._judged())
            self.folder.offer_best(self.phase.name, epoch, figures.accuracy, judged)
        self.accelerator.wait_for_everyone()

    def _epoch(self, epoch: int) -> None:
        # All processes draw the images' order alike, what else is drawn differs by process. Nothing that was drawn
        # before counts, so a state holds no random numbers.
        letters = sum(map(ord, self.phase.name))
        seed = (self.config.seed * 1_000_003 + letters * 10_007 + epoch * 101) % 2**31
        set_seed(seed)
        self.train.set_epoch(seed)
        shared = getattr(self.train, "synchronized_generator", None)
        if shared is not None:
            shared.manual_seed(seed)
        batches = iter(self.train)
        set_seed(seed + 1 + self.accelerator.process_index)
        self.model.train()
        started = time.perf_counter()
        for index, (images, targets) in enumerate(batches):
            step = epoch * len(self.train) + index
            learning_rate = self._set_learning_rates(step)
            values = self.step(images, targets, epoch, step, learning_rate)
            self.progress.step(values)
            if (step + 1) % self.config.log_every == 0 or index + 1 == len(self.train):
                rate = self.batch * (index + 1) / (time.perf_counter() - started)
                standing = self._standing()
                self.progress.stand(standing)
                self._record({"event": "step", "epoch": epoch + 1, "step": step + 1, **values, **standing,
                              "learning_rate": learning_rate, "images_per_s": round(rate, 2)})  # fmt: skip

    def step(self, images: Tensor, targets: Tensor, epoch: int, step: int, learning_rate: float) -> dict[str, float]:
        """Take one optimizer step on images [B, channels, height, width] and targets [B]; return its losses by name."""
        labels = targets
        if self.mixup is not None and len(images) % 2 == 0:
            images, labels = self.mixup(images, targets)
        with autocast(self.accelerator.device, self.config.precision):
            logits = logits_of(self.model(images)).float()
        loss = task_loss(logits, labels, self.settings.label_smoothing)
        if self.teacher is not None:
            agreement = self._agreement(logits, images)
            loss = (1 - self.settings.distillation) * loss + self.settings.distillation * agreement
        values = {"task_loss": loss.detach()}
        if self.phase.budget is not None:
            budget_loss = self._budget_share(step) * self.phase.budget()
            values["budget_loss"] = budget_loss.detach()
            loss = loss + budget_loss.to(loss.dtype)
        values["loss"] = loss.detach()
        # One transfer brings all figures of the step to the host.
        figures = dict(zip(values, torch.stack([value.float() for value in values.values()]).tolist()))
        if not math.isfinite(figures["loss"]):
            self._stop_diverged(figures["loss"], epoch, step, learning_rate)
        self.accelerator.backward(loss)
        if self.settings.clip_gradient > 0:
            held = [parameter for group in self.weights.param_groups for parameter in group["params"]]
            self.accelerator.clip_grad_norm_(held, self.settings.clip_gradient)
        for optimizer in (self.weights, self.gates):
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self._plain())
        return figures

    def _agreement(self, logits: Tensor, images: Tensor) -> Tensor:
        """Return how far the student's logits are from what the teacher makes of the same images, a scalar."""
        assert self.teacher is not None
        with torch.no_grad(), autocast(self.accelerator.device, self.config.precision):
            guidance = logits_of(self.teacher(images)).float()
        if self.settings.distillation_kind == "hard":
            return hard_distillation_loss(logits, guidance)
        return distillation_loss(logits, guidance, self.settings.distillation_temperature)

    def _budget_share(self, step: int) -> float:
        """Return the share of its weight that the budget loss has in a step."""
        warmup = self.total * getattr(self.settings, "budget_warmup", 0.0)
        return min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0

    def _set_learning_rates(self, step: int) -> float:
        peak, minimum = self.settings.learning_rate, self.settings.minimum_learning_rate
        warmup = int(self.settings.warmup_epochs * len(self.train))
        rate = self.scale * learning_rate_at(step, self.total, warmup, peak, minimum)
        for group in self.weights.param_groups:
            group["lr"] = rate
        return rate

    def _standing(self) -> dict[str, Any]:
        """Return how a search stands: its cost against the target (shares of the dense cost), and layers by kind."""
        budget = self.phase.budget
        if budget is None:
            return {}
        kinds = Counter(attention.decided() for attention, _ in budget.layers)
        with torch.no_grad():
            cost = budget.expected_cost().item() / budget.cost.dense
        return {
            "cost": round(cost, 5),
            "target": round(budget.target / budget.cost.dense, 5),
            "kinds": {kind: kinds.get(kind, 0) for kind in KINDS},
        }

    def _record(self, values: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.folder.record(self.phase.name, values)

    def _parts(self) -> dict[str, Any]:
        """Return what a state holds: the models and optimizers, by name."""
        average = self.average.module if self.average is not None else None
        parts = {"model": self._plain(), "average": average, "weights": self.weights, "gates": self.gates}
        return {name: part for name, part in parts.items() if part is not None}

    def _save(self, epoch: int, figures: Evaluation) -> None:
        if self.accelerator.is_main_process:
            found = {name: tensors_of(part) for name, part in self._parts().items()}
            tensors = {f"{name}.{key}": value for name, own in found.items() for key, value in own.items()}
            self.folder.save_state(self.phase.name, epoch, tensors, vars(figures))
        self.accelerator.wait_for_everyone()

    def _resume(self) -> tuple[int, Evaluation | None]:
        """Load the last saved state, if any; return the epochs done and the figures then."""
        done, tensors, figures = self.folder.read_state(self.phase.name)
        if self.accelerator.is_main_process:
            self.folder.rewind(self.phase.name, done)
        if done == 0:
            return 0, None
        for name, part in self._parts().items():
            prefix = f"{name}."
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            load_tensors(part, own, f"of epoch {done} of {self.phase.name}")
        return done, Evaluation(**figures)

    def _stop_diverged(self, loss: float, epoch: int, step: int, learning_rate: float) -> None:
        standing = ""
        if self.gates is not None:
            logits = torch.cat([parameter.detach().flatten() for parameter in gate_parameters(self.phase.model)])
            kinds = ", ".join(f"{count} {kind}" for kind, count in self._standing()["kinds"].items())
            gates = f"gate logits {logits.min().item():.3g} to {logits.max().item():.3g}"
            standing = f", attention {kinds}, {gates}, gate learning rate {self.gates.param_groups[0]['lr']:.3g}"
        saved = self.folder.newest_state(self.phase.name)
        kept = f"the last good state is {saved}" if saved else "no epoch was finished yet"
        raise RunError(
            f"the loss became {loss} at step {step + 1} of {self.phase.name} (epoch {epoch + 1}): learning rate "
            f"{learning_rate:.3g}{standing}; {kept}; lower --{self.phase.name}.learning_rate and continue with --resume"
        )


def learning_rate_at(step: int, total: int, warmup: int, peak: float, minimum: float) -> float:
    """Return the learning rate of a step: linear warm-up from zero to the peak, then a cosine down to the minimum."""
    minimum = min(minimum, peak)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
