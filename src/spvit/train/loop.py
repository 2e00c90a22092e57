"""The one training loop, on Accelerate: dense training, search and fine-tuning are phases of it.

A phase supplies the model, its settings and its extra losses. Every epoch, step and image has a seed of its own, so a
state holds no random numbers, and a run that continues from one repeats exactly what an uninterrupted one does.
"""

import copy
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import set_seed
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from spvit.architecture import KINDS
from spvit.checkpoint import read_weights
from spvit.errors import RunError, RunStoppedError
from spvit.search.budget_loss import BudgetLoss
from spvit.search.network import gate_parameters
from spvit.train.best import Best
from spvit.train.data import Images, epoch_loader, first_images, mixup_of, seed_of, validation_loader
from spvit.train.figures import Answering, Figures, Reference, evaluate, figures_from, finite, is_finite
from spvit.train.kept_views import KeptViews
from spvit.train.losses import open_teacher
from spvit.train.optimizers import groups_of, learning_rate_at, load_tensors, optimizer_of, tensors_of
from spvit.train.processes import by_the_first, make_accelerator, share_buffers, summed
from spvit.train.progress import PhaseProgress
from spvit.train.reading import Reading
from spvit.train.run_folder import RunFolder
from spvit.train.settings import LoopConfig, PhaseConfig
from spvit.train.shards import local, put_together, sharded
from spvit.train.signals import deferred
from spvit.train.step_loss import StepLoss
from spvit.train.steps import compiled, groups
from spvit.train.tracking import Tracking


@dataclass(frozen=True)
class Run:
    """What the phases of a run share, with the teachers that settings name, by name, once they are open."""

    images: Images
    folder: RunFolder
    config: LoopConfig
    progress: PhaseProgress = field(default_factory=PhaseProgress)
    reference: Reference | None = None
    """Whom models are to agree with, where the images have no classes."""
    kept: KeptViews | None = None
    """The training images, where these are views with the reference's answers."""
    teachers: dict[str, nn.Module] = field(default_factory=dict)

    def teacher(self, name: str, weights: bool = True) -> nn.Module:
        """Return the teacher of a name. Raises ModelError, CheckpointError or DataError when it cannot teach."""
        if name not in self.teachers:
            self.teachers[name] = open_teacher(name, self.images.classes, self.images.preprocessing, weights)
        return self.teachers[name]


@dataclass
class Phase:
    """What the loop trains: a model, its settings, the budget of a search, and who teaches if settings name no one.

    Steps are those after which it ends, where they are fewer than those of the epochs.
    """

    name: str
    model: nn.Module
    config: PhaseConfig
    budget: BudgetLoss | None = None
    teacher: nn.Module | None = None
    steps: int | None = None


def run_phase(phase: Phase, run: Run) -> Figures:
    """Train a phase's model in place, from the last saved state if the folder has one; return its final figures.

    Raises RunStoppedError at SIGTERM and SIGUSR1, after the step that is under way, with the state saved.
    """
    with deferred() as asked:
        loop = Loop(phase, run, asked)
        try:
            return loop.run()
        finally:
            loop.tracking.close()
            loop.loss.close()


class Loop:
    """A phase under way: its parts on their devices, and one step after another."""

    def __init__(self, phase: Phase, run: Run, asked: Callable[[], int] = lambda: 0) -> None:
        self.phase, self.asked = phase, asked
        self.saved_at = time.monotonic()
        self.ends_at = self.saved_at + 60 * (phase.config.minutes or math.inf)
        self.place = 0, 0  # epochs done, and steps of the next
        self.settings = settings = phase.config
        self.folder, self.config, self.progress, self.images = run.folder, run.config, run.progress, run.images
        self.accelerator = make_accelerator()
        self.tracking = Tracking(run.config, run.folder, phase.name)
        self.reference = run.reference
        self.mixup = mixup_of(run.images.config, max(1, len(run.images.classes)), settings.label_smoothing)
        processes = self.accelerator.num_processes
        loader = epoch_loader(run.images, processes, self.accelerator.process_index)
        self.draws: Any = loader.sampler
        sets: dict[str, Any] = {"training": run.images.train, "validation": run.images.validation}
        self.counts = {name: len(own) for name, own in sets.items()}
        # The sampler shares out the images itself.
        self.train = prepare_data_loader(loader, self.accelerator.device, 1, 0, put_on_device=True)
        self.accumulate = run.images.config.accumulate
        self.steps = len(self.train) // self.accumulate  # of an epoch
        steps = settings.epochs * self.steps
        self.total = max(1, steps if phase.steps is None else min(steps, phase.steps))
        self.sharded = run.config.shard and phase.budget is None and processes > 1
        self.whole = phase.model.to("cpu" if self.sharded else self.accelerator.device)
        if self.sharded:
            phase = self.phase = replace(phase, model=copy.deepcopy(self.whole))
        self.kept, self.average = phase.model, None  # type: nn.Module, ModelEmaV3 | None
        if settings.averaging_epochs > 0:
            # After so many epochs as the average reaches back, 1/e of it is left of where it started.
            decay = math.exp(-1 / (settings.averaging_epochs * self.steps))
            self.average = ModelEmaV3(phase.model, decay=decay, foreach=not self.sharded)
            self.kept = self.average.module
        named = settings.teacher
        teacher = phase.teacher if named is None or run.reference is not None else run.teacher(named)
        teacher = None if teacher is None else teacher.to(self.accelerator.device).eval()
        some = partial(first_images, run.images, self.accelerator.device)
        self.loss = StepLoss(phase.name, settings, phase.model, teacher, run.reference, some, run.kept)
        self.model: Any = self._called(phase.model)
        optimizer, validation = optimizer_of(phase.model, settings, self.total), validation_loader(run.images)
        self.validation, self.optimizer = self.accelerator.prepare(validation, optimizer)
        if not self.sharded:
            self.model = self.accelerator.prepare(self.model)
        # The weights that are kept: evaluated by all processes, and saved by the first.
        self.judged = self.model if self.average is None else self._called(self.kept)
        # Evaluation runs as it is: for its mode, and for its last batch, it would be compiled again.
        self.forward: Callable[[Tensor], Any] = self.model
        if run.config.compile and phase.budget is None:
            self.forward = compiled(self.model)
        elif run.config.compile:
            self.progress.note(f"{phase.name} is not compiled: each step draws gates, which choose what runs")
        if run.config.shard and phase.budget is not None:
            self.progress.note(f"{phase.name} is not sharded: its budget reads the gates of all blocks at once")
        self.batch = run.images.config.batch_size * self.accumulate * processes
        self.scale = self.batch / settings.reference_batch if settings.reference_batch else 1.0
        warmup = int(settings.warmup_epochs * self.steps)
        self.rates = warmup, settings.peak_learning_rate, settings.minimum_learning_rate
        self.parts: dict[str, Any] = {"model": phase.model, "optimizer": self.optimizer}  # what a state holds
        # The losses of the last step and the sum of all, since they were read; the first and last step of these.
        self.unread: tuple[dict[str, Tensor], Tensor, int, int] | None = None
        if self.average is not None:
            self.parts["average"] = self.kept
        self.best = Best(self.folder, phase.name, self.kept, settings.keep_best and run.reference is not None)

    def _called(self, model: nn.Module) -> nn.Module:
        """Return a model that answers what a step compares: the parts that count, where there is a reference."""
        answering = model if self.reference is None else Answering(model, self.reference)
        return sharded(model, answering) if self.sharded else answering

    def run(self) -> Figures:
        """Train from the last saved state to the end and return the final figures."""
        figures, steps = self._resume(), self.steps
        epochs, (done, start) = min(self.settings.epochs, math.ceil(self.total / max(1, steps))), self.place
        if self.place == (0, 0) and self.settings.keep_best:
            figures = self._evaluate(0)
        with self.progress.bar(self.phase.name, self.total, done * steps + start):
            for epoch in range(done, epochs):
                self._epoch(epoch, start if epoch == done else 0)
                figures = self._evaluate(epoch + 1)
                self._record("evaluation", epoch, vars(figures))
                over = self._over() or self._stale(epoch + 1)
                self.place = epochs if over else epoch + 1, 0
                if is_finite(figures):
                    self._save(figures)
                self.progress.epoch(epoch + 1, epoch + 1 if over else epochs, figures.words, vars(figures))
                where = f"{self.phase.name} epoch {epoch + 1}"
                self.reading.judge(self.images, figures.images, where, self.folder, self.progress)
                if over:
                    break
        figures = self._evaluate() if figures is None else figures
        if self.best.start:
            with self.best.half_way():
                self._evaluate(epochs, "half-way from its start to its end")
        if self.kept is not self.phase.model:
            self.phase.model.load_state_dict(self.kept.state_dict())
        best, path = self.folder.best(self.phase.name)
        if self.settings.keep_best and best["accuracy"] > figures.quality:
            load_tensors(self.phase.model, read_weights(path), "of the best weights")
            self.judged = self.model
            figures = self._evaluate(name=best["name"])
            self.progress.note(f"{self.phase.name}: {best['name']} was the best on the validation images and is kept")
        if self.sharded:
            put_together(self.phase.model, self.whole)
        self.accelerator.free_memory()
        return finite(figures, self.whole)

    def _evaluate(self, epoch: int | None = None, name: str = "") -> Figures:
        """Return the figures now; of an epoch its weights are kept, if they are the best and that is asked for."""
        share_buffers(self.kept)
        [figures] = evaluate(
            *([self.judged], self.validation, self.accelerator, self.config.precision, self.reference),
            after_batch=(lambda: None) if name else self._stop_or_save,  # no state is of weights put there to be tried
        )
        if self.settings.keep_best and epoch is not None and is_finite(figures):
            name = name or (f"epoch {epoch}" if epoch > 0 else "what it started from")
            self.best.offer(epoch, name, figures.quality)
        return figures

    def _epoch(self, epoch: int, start: int) -> None:
        # All processes draw the images' order alike; what else is drawn differs by process, step and image.
        seed, process = seed_of(self.config.seed, self.phase.name, epoch), self.accelerator.process_index
        self.draws.begin(seed, start * self.batch // self.accelerator.num_processes)
        self.model.train()
        started = time.perf_counter()
        values: dict[str, float] = {}
        self.reading = Reading(self.train, self.accelerator.device)
        for index, batches in enumerate(groups(self.reading, self.accumulate), start):
            step = epoch * self.steps + index
            set_seed(seed_of(seed, process, "step", index))
            self._keep_unread(self.step(batches, step), step)
            logs = (step + 1) % self.config.log_every == 0 or index + 1 == self.steps
            if logs:
                values = self._read()
                rate = self.batch * (index + 1 - start) / (time.perf_counter() - started)
                more = {"learning_rate": groups_of(self.optimizer)[-1]["lr"], "images_per_s": round(rate, 2)}
                more["data_wait"] = round(self.reading.waited(), 3)
                self._record("step", epoch, {"step": step + 1, **values, **more})
            self.progress.step(values)
            self.place = epoch, index + 1
            # Where there are several processes, to ask the others is to wait for the device.
            if logs or self.accelerator.num_processes == 1:
                self._stop_or_save()
                if self._over():
                    self._read()
                    break

    def _over(self) -> bool:
        """Return whether the phase has had its steps, or its minutes are over, to any process."""
        epoch, step = self.place
        if epoch * self.steps + step >= self.total:
            return True
        return self.ends_at < math.inf and summed(time.monotonic() > self.ends_at)[0] > 0

    def _stale(self, epoch: int) -> bool:
        """Return whether so many epochs as there is patience for have brought nothing better."""
        patience = self.settings.patience
        if patience == 0 or epoch - self.folder.best(self.phase.name)[0]["gained"] < patience:
            return False
        self.progress.note(f"{self.phase.name} ends: {patience} epochs without a better validation figure")
        return True

    def _stop_or_save(self) -> None:
        """Save the state if it is time, and if a signal asked to stop raise RunStoppedError."""
        minutes, number = self.config.save_minutes, self.asked()
        due = 0 < 60 * minutes < time.monotonic() - self.saved_at and self.accelerator.is_main_process
        stop, save = summed(number, due)
        if stop or save:
            self._read()
            self._save()
        if stop:
            (epoch, step), name = self.place, self.phase.name
            at = f"after {epoch} epochs and {step} steps of {name}, where its state is saved"
            signals = signal.Signals(number).name if number else "a signal to another process"
            raise RunStoppedError(f"stopped by {signals} {at}; continue with --resume", number or signal.SIGTERM)

    def step(self, batches: Iterable[tuple[Tensor, Tensor]], step: int) -> dict[str, Tensor]:
        """Take one optimizer step on `images.accumulate` batches; return its losses by name, on the device.

        batches: images [B, channels, height, width] and targets [B].
        """
        rate = self.scale * learning_rate_at(step, self.total, *self.rates)
        for group in groups_of(self.optimizer):
            group["lr"] = rate * group.get("lr_scale", 1.0)
        sums: dict[str, Tensor] = {}
        for number, (images, targets) in enumerate(batches, 1):
            last = number == self.accumulate
            if self.mixup is not None and len(images) % 2 == 0:
                images, targets = self.mixup(images, targets)
            if self.sharded:
                self.model.set_requires_gradient_sync(last)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss, values = self.loss(self.forward, images, targets, self.config.precision)
                loss, values = loss / self.accumulate, {name: own / self.accumulate for name, own in values.items()}
                if last and self.phase.budget is not None:
                    budget_loss = self._budget_share(step) * self.phase.budget()
                    values["budget_loss"] = budget_loss.detach()
                    loss = loss + budget_loss.to(loss.dtype)
                self.accelerator.backward(loss)
            values["loss"] = loss.detach()
            sums = {name: own + sums[name] if name in sums else own for name, own in values.items()}
        if self.settings.clip_gradient > 0:
            held = [parameter for group in groups_of(self.optimizer) for parameter in group["params"]]
            self.accelerator.clip_grad_norm_(held, self.settings.clip_gradient)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.phase.model)
        return sums

    def _keep_unread(self, losses: dict[str, Tensor], step: int) -> None:
        """Keep a step's losses on the device, which need not be waited for until they are read."""
        _, total, first, _ = self.unread or ({}, torch.zeros_like(losses["loss"]), step, step)
        self.unread = losses, total + losses["loss"], first, step

    def _read(self) -> dict[str, float]:
        """Return the losses of the last step. Raises RunError when one since they were last read was not finite."""
        if self.unread is None:
            return {}
        losses, total, first, last = self.unread
        *found, seen = torch.stack([value.float() for value in (*losses.values(), total)]).tolist()
        [seen] = summed(seen)
        if not math.isfinite(seen):
            where = f"step {last + 1}" if first == last else f"one of steps {first + 1} to {last + 1}"
            self._stop_diverged(f"the loss became {seen} at {where}", first)
        self.unread = None
        return dict(zip(losses, found))

    def _budget_share(self, step: int) -> float:
        """Return the share of its weight that the budget loss has in a step."""
        warmup = self.total * getattr(self.settings, "budget_warmup", 0.0)
        return min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0

    def _standing(self) -> dict[str, Any]:
        """Return how a search stands: its cost against the target (shares of the dense cost), and layers by kind."""
        budget = self.phase.budget
        if budget is None:
            return {}
        kinds = Counter(attention.decided() for attention, _ in budget.layers)
        with torch.no_grad():
            cost = budget.expected_cost().item() / budget.cost.dense
        target = round(budget.target / budget.cost.dense, 5)
        return {"cost": round(cost, 5), "target": target, "kinds": {kind: kinds.get(kind, 0) for kind in KINDS}}

    def _record(self, event: str, epoch: int, values: dict[str, Any]) -> None:
        standing = self._standing()
        self.progress.stand(standing)
        if self.accelerator.is_main_process:
            figures = {**values, **standing}
            self.folder.record({"phase": self.phase.name, "event": event, "epoch": epoch + 1, **figures})
            self.tracking.log(event, values.get("step", (epoch + 1) * self.steps), figures)

    def _save(self, figures: Figures | None = None) -> None:
        (epoch, step), about = self.place, vars(figures) if figures else {}
        if summed(not all(local(parameter).isfinite().all() for parameter in self.phase.model.parameters()))[0] > 0:
            self._stop_diverged("a weight is not finite after the last step", epoch * self.steps + step - 1)
        found = {name: tensors_of(part) for name, part in self.parts.items()}
        tensors = {f"{name}.{key}": value for name, own in found.items() for key, value in own.items()}
        by_the_first(lambda: self.folder.save_state(self.phase.name, epoch, step, tensors, about, self.counts))
        self.saved_at = time.monotonic()

    def _resume(self) -> Figures | None:
        """Load the last saved state, if any; return the figures then."""
        about, tensors = self.folder.read_state(self.phase.name)
        self.folder.check_images(about.get("images", self.counts), self.counts)
        epoch, step = self.place = about["epoch"], about["step"]
        if self.accelerator.is_main_process:
            self.folder.rewind(self.phase.name, epoch, step, epoch * self.steps + step)
            self.folder.drop_damaged_best(self.phase.name)
        for name, part in self.parts.items() if tensors else ():
            prefix = f"{name}."
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            load_tensors(part, own, f"of epoch {epoch} of {self.phase.name}")
        return figures_from(about["figures"]) if about["figures"] else None

    def _stop_diverged(self, problem: str, step: int) -> None:
        name, standing = self.phase.name, ""
        if self.phase.budget is not None:
            logits = torch.cat([parameter.detach().flatten() for parameter in gate_parameters(self.phase.model)])
            kinds = ", ".join(f"{count} {kind}" for kind, count in self._standing()["kinds"].items())
            standing = f", attention {kinds}, gate logits {logits.min().item():.3g} to {logits.max().item():.3g}"
            standing += "".join(f", gate learning rate {group['lr']:.3g}" for group in groups_of(self.optimizer, True))
        saved = self.folder.newest_state(name)
        kept = f"the last good state is {saved}" if saved else "none was saved yet"
        at = f"{problem} of {name} (epoch {step // self.steps + 1})"
        advice = f"lower --{name}.learning_rate and continue with --resume"
        rate = self.scale * learning_rate_at(step, self.total, *self.rates)
        raise RunError(f"{at}: learning rate {rate:.3g}{standing}; {kept}; {advice}")
