"""The best weights of a phase: which are offered, and which the run folder keeps."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from spvit.train.optimizers import tensors_of
from spvit.train.processes import by_the_first, processes, summed
from spvit.train.run_folder import RunFolder
from spvit.train.shards import local


class Best:
    """Keeps a model's weights where they are the best so far; with `half_way`, remembers those that it starts from."""

    def __init__(self, folder: RunFolder, phase: str, model: nn.Module, half_way: bool) -> None:
        self.folder, self.phase, self.model = folder, phase, model
        self.start = [value.clone() for value in self._floats()] if half_way else []

    def offer(self, epoch: int, name: str, quality: float) -> None:
        """Keep the weights, named in words, if none are better: of equals the later, which trained longer."""
        # The first decides for all, who gather shards together.
        best = self.folder.best(self.phase)[0]["accuracy"] if processes().is_main_process else math.inf
        if summed(quality >= best)[0] > 0:
            by_the_first(partial(self.folder.keep_best, self.phase, epoch, name, quality, tensors_of(self.model)))

    @contextmanager
    def half_way(self) -> Iterator[None]:
        """Let the model have the weights half-way from its start to its end.

        Where a rate is too high for so few images these are better than both (docs/experiments/distillation.md).
        """
        ends = [value.clone() for value in self._floats()]
        self._put([torch.lerp(start, end, 0.5) for start, end in zip(self.start, ends)])
        yield
        self._put(ends)

    def _put(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for own, value in zip(self._floats(), values):
                own.copy_(value)

    def _floats(self) -> list[Tensor]:
        """Return weights and statistics, of which this process may hold parts."""
        return [local(value) for value in self.model.state_dict().values() if value.is_floating_point()]
