"""One run at a time in a folder: a lock that the system takes back when its process ends, however it ends."""

import errno
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from spvit.errors import RunFolderError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"

logger = logging.getLogger("spvit")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made when absent. Raises RunFolderError saying who holds it already."""
    if folder.is_symlink() and not folder.exists():
        raise RunFolderError(f"output {folder} is a link to {folder.readlink()}, which does not exist; make that first")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    file = _held(path)
    try:
        before = _holder(file)
        if before.get("host", socket.gethostname()) != socket.gethostname():
            logger.warning("%s was left by %s; if that still runs there, end one of the two", folder, _words(before))
        own = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        file.truncate(0)
        file.write(json.dumps(own) + "\n")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _held(path: Path) -> TextIO:
    """Return the open file of a lock that is ours now."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                logger.warning("%s cannot be locked (%s); start no other run there", path.parent, error.strerror)
                return file
            holder = _words(_holder(file))
            file.close()
            advice = "wait for its end, or name another folder"
            raise RunFolderError(f"output {path.parent} is in use by {holder}; {advice}") from error
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # its holder removed it just now


def _holder(file: TextIO) -> dict[str, str]:
    file.seek(0)
    try:
        found = json.loads(file.read())
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def _words(holder: dict[str, str]) -> str:
    known = [f"{words} {holder[name]}" for name, words in (("host", "on"), ("since", "since")) if name in holder]
    return " ".join([f"process {holder['process']}" if "process" in holder else "another process", *known])
