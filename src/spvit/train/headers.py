"""A look at the header of every image file before a run: what cannot be read is named before anything expensive begins.

What was read stays known in the run folder, so that a continued run looks at new and changed files only.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import Subset

from spvit.errors import CheckpointError, DataError
from spvit.train.data import Images, file_at
from spvit.train.image_files import Stored, check_header
from spvit.train.loop import Run
from spvit.train.processes import by_the_first
from spvit.train.reading import NAMED
from spvit.train.states import about_state, read_state, write_state

TOGETHER = 256  # files that a thread looks at in turn
THREADS = 16  # file systems far away take long for each, but many at a time

Looked = tuple[list[int], dict[str, str]]  # marks of files that can be read, and why others cannot, by name


def checked(run: Run) -> Run:
    """Return a run without the images whose headers cannot be read.

    Raises DataError naming them when settings do not leave them out, or they are more than settings allow.
    """
    if not run.images.config.check:
        return run
    by_the_first(lambda: _look(run))
    path = run.folder.headers
    left_out = about_state(path)["unreadable"] if path.is_file() else {}
    return replace(run, images=_without(run.images, left_out)) if left_out else run


def _look(run: Run) -> None:
    """Look at all files that are not known, and write what was found."""
    path, parts = run.folder.headers, [part for part in _parts(run.images).values() if len(part) and file_at(part, 0)]
    count = sum(map(len, parts))
    if not count:
        return
    known, before = set[int](), dict[str, str]()
    if path.is_file():
        with suppress(CheckpointError):  # a damaged one is made anew
            about, tensors = read_state(path)
            known, before = set(tensors["readable"].tolist()), about["unreadable"]
    chunks = [
        (part, range(len(part))[start : start + TOGETHER]) for part in parts for start in range(0, len(part), TOGETHER)
    ]
    marks: list[int] = []
    unreadable: dict[str, str] = {}
    look = partial(_looked_at, known, before)
    with run.progress.bar("headers", len(chunks)), ThreadPoolExecutor(THREADS) as threads:
        for own, bad in threads.map(look, chunks):
            marks += own
            unreadable |= bad
            run.progress.step()
    _judge(unreadable, count, run)
    write_state(path, {"readable": torch.tensor(marks)}, {"unreadable": unreadable})


def _judge(unreadable: dict[str, str], count: int, run: Run) -> None:
    """Raise DataError when a run may not go on without such images; else say how many there are, and list them."""
    config = run.images.config
    if not unreadable:
        return
    said = f"{len(unreadable):,} of {count:,} images cannot be read"
    first = "; ".join(list(unreadable.values())[:NAMED])
    if not config.skip_corrupt:
        raise DataError(f"{said}: {first}; remove them, or pass --images.skip_corrupt true")
    if len(unreadable) > config.most_unreadable * count:
        most = f"images.most_unreadable {config.most_unreadable:.2%}"
        raise DataError(f"{said}, more than {most} (a share; raise it, or remove them): {first}")
    run.folder.list_unreadable(unreadable)
    run.progress.note(f"{said} and are left out; they are listed in {run.folder.unreadable}")


def _looked_at(known: set[int], before: dict[str, str], chunk: tuple[Any, range]) -> Looked:
    """Return what is found of some files of a data set; those that are known are not opened."""
    marks, unreadable = [], {}
    part, places = chunk
    for file in (file_at(part, place) for place in places):
        mark, name = _mark(file), str(file)
        try:
            if name in before:
                raise DataError(before[name])
            if mark not in known:
                check_header(file)
            marks.append(mark)
        except DataError as error:
            unreadable[name] = str(error)
    return marks, unreadable


def _mark(file: Any) -> int:
    """Return a number that changes with a file's name, size and time of change; 0 when it is not there."""
    try:
        about = os.stat(file.file if isinstance(file, Stored) else file)
    except OSError:
        return 0
    text = f"{file}\0{about.st_size}\0{about.st_mtime_ns}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True)


def _parts(images: Images) -> dict[str, Any]:
    return {name: getattr(images, name) for name in ("train", "validation")}


def _without(images: Images, left_out: dict[str, str]) -> Images:
    """Return images but those of some names."""
    kept: dict[str, Any] = {
        name: Subset(part, [place for place in range(len(part)) if str(file_at(part, place)) not in left_out])
        for name, part in _parts(images).items()
    }
    return replace(images, **kept, views=Subset(images.views, kept["train"].indices))
