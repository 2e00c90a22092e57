"""How the reading of an epoch's images goes: how long steps wait for them, and which cannot be read."""

import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from spvit.errors import RunError
from spvit.train.data import Images, file_at
from spvit.train.processes import by_the_first, summed
from spvit.train.progress import PhaseProgress
from spvit.train.run_folder import RunFolder

MUCH, LONG = 0.3, 10.0
"""Share of an epoch, and seconds, that waiting for images takes when it is worth a word."""
NAMED = 10
"""Images that a message names."""


class Reading:
    """The batches of an epoch, and what is found out while they are gone through."""

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self.loader, self.on_gpu = loader, device.type == "cuda"
        self.drawn = 0
        self.unread: list[int] = []  # indices of images
        self.seconds = [0.0, 0.0]  # waited, and in all
        self._waits: list[tuple[Any, Any]] = []  # since they were last counted

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        asked = self._moment()
        for images, targets, unread in self.loader:
            self._waits.append((asked, self._moment()))
            self.drawn += len(targets) + len(unread)
            self.unread += unread.tolist() if len(unread) else []
            yield images, targets
            asked = self._moment()

    def _moment(self) -> Any:
        """Return the time now; on a GPU that at which it has done all it was given, for till then it does not wait."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def waited(self) -> float:
        """Return the share of the time since this was last called in which steps waited for images."""
        waits, self._waits, now = self._waits, [], self._moment()
        if self.on_gpu:
            now.synchronize()
        found = sum(_seconds(*wait) for wait in waits), _seconds(waits[0][0], now)
        self.seconds = [own + new for own, new in zip(self.seconds, found)]
        return found[0] / found[1]

    def judge(self, images: Images, judged: int, where: str, folder: RunFolder, progress: PhaseProgress) -> None:
        """Say what was found, when an epoch has ended and so many validation images were judged.

        Raises RunError when more images could not be read than settings allow.
        """
        waited, whole = self.seconds
        if waited > max(LONG, MUCH * whole):
            workers = f"read them in more processes (--images.workers, now {images.config.workers})"
            progress.note(f"{where}: {waited / whole:.0%} of the time was spent waiting for images; {workers}")
        lost, drawn = map(int, summed(len(self.unread), self.drawn))
        validation: Any = images.validation
        lost, drawn = lost + len(validation) - judged, drawn + len(validation)
        if not lost:
            return
        own = [str(file_at(images.train, index) or f"training image {index}") for index in self.unread]
        names = sorted(set(gather_object(own)))
        by_the_first(partial(folder.list_unreadable, dict.fromkeys(names, f"its pixels, in {where}")))
        said = f"{lost:,} of {drawn:,} images of {where} could not be read"
        most = images.config.most_unreadable
        if lost > most * drawn:
            first = "; ".join(names[:NAMED]) or "validation images, as the warnings say"
            advice = "repair or remove them, or raise it, and continue with --resume"
            raise RunError(f"{said}, more than images.most_unreadable {most:.2%}: {first}; {advice}")
        progress.note(f"{said}; {folder.unreadable} lists those of training")


def _seconds(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
