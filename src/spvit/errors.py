"""Every error that spvit raises for what a user did or has; each says what was wrong and what to do."""

import re
from pathlib import Path


class SpvitError(Exception):
    """Base of all errors that spvit raises on purpose."""


class ArchitectureError(SpvitError, ValueError):
    """An architecture is malformed or does not fit the host it is used with."""


class BudgetError(SpvitError, ValueError):
    """A budget is malformed, or cannot be reached."""


class CalibrationError(SpvitError, ValueError):
    """Calibration images cannot be used: too few, of another size, or leading to activations that are not finite."""


class CheckpointError(SpvitError, ValueError):
    """A checkpoint cannot be read or written, or does not fit the model."""


class ConstraintError(SpvitError, ValueError):
    """What a decision shall leave alone is malformed, or names what the host does not have."""


class DataError(SpvitError, ValueError):
    """The images cannot be found or read, or do not fit each other or the model."""


class GridError(SpvitError, ValueError):
    """Tokens do not fit the patch grid of the layer that got them: a model's part was called, or patches dropped."""


class HubError(SpvitError, RuntimeError):
    """The Hugging Face hub cannot be reached, or has not, or does not allow, what was asked for."""


class ModelError(SpvitError, ValueError):
    """A model cannot be found, downloaded or built."""


class NotSearchableError(SpvitError, ValueError):
    """A searchable network was expected, or a plain one, and the other was found."""


class ReportError(SpvitError, ValueError):
    """A report cannot be written: a package is missing, or another file is in its place."""


class RunError(SpvitError, RuntimeError):
    """A run failed; what it had produced so far is kept."""


class RunStoppedError(RunError):
    """A signal asked a run to stop, and its state is saved. `number` is the signal's."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class RunFolderError(SpvitError, ValueError):
    """A run folder is in use, or holds no run to continue."""


class UnsupportedHostError(SpvitError, ValueError):
    """The model is of no supported family, or has a part that its family's adapter does not know."""


class UnknownPartError(UnsupportedHostError):
    """A model of a known family has a part that is not the family's own; what it does may still be recognised."""


class ZooError(SpvitError, ValueError):
    """A published model is unknown, or something was asked of it that it does not have."""


class ExportError(SpvitError, ValueError):
    """A model cannot be exported, a package for it is missing, or what was written answers otherwise."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type when it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def not_written(path: Path, error: Exception) -> RunError:
    """Return the error that says that a file could not be written, of the disk's or safetensors' own."""
    reason = getattr(error, "strerror", None) or first_line(error)
    return RunError(f"{path} could not be written ({reason}); what was there before is as it was")


def why_unread(path: Path, error: Exception) -> str:
    """Return why a file of weights is not read."""
    with path.open("rb") as file:
        if file.read(9).lstrip().startswith((b"version ", b"<!", b"<h", b"<?")):
            return "it is a pointer of git-lfs or a web page; download the file itself (git lfs pull)"
    if refused := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):  # torch says how to read it anyway
        return f"it holds a {refused[1]}, which is not read since it could run code; save the weights alone"
    return first_line(error)
