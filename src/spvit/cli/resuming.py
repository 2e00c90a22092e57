"""What a continued run must share with the run that it continues, so that all that it writes belongs together."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import yaml

from spvit.errors import RunFolderError
from spvit.train.deciding import ARCHITECTURE, finetuned
from spvit.train.loop import STATE

FIXED = (
    "model",
    "model_args",
    "pretrained",
    "checkpoint",
    "data",
    "macs",
    "params",
    "seed",
    "architecture",
    "initialise",
    "repair",
    "calibration_images",
    "multiple",
)


def folder_to_resume(arguments: list[str]) -> str | None:
    """Return the output folder when a command line's own words ask to resume it; None otherwise."""
    words = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    words.add_argument("--output")
    words.add_argument("--resume", nargs="?", const="true", default="false")
    known, _ = words.parse_known_args(arguments[1:])
    return known.output if yaml.safe_load(known.resume) is True else None


def check_continued(output: Path, before: Any, options: Any) -> None:
    """Refuse settings with which a run cannot be continued.

    Args:
        output: the run folder.
        before: options of its run.
        options: those to continue it with, of the same command.

    Raises:
        RunFolderError: names the first setting that differs where it must not.
    """
    for field in FIXED:
        if hasattr(options, field) and getattr(options, field) != getattr(before, field):
            raise RunFolderError(
                f"output {output} holds a run with --{field} {getattr(before, field)}, not "
                f"{getattr(options, field)}; continue it with its own, or name another folder"
            )
    ways = [_way_to_decide(settings) for settings in (before, options)]
    if ways[0] != ways[1]:
        raise RunFolderError(
            f"output {output} holds a run that decides by {ways[0]}, not by {ways[1]}; continue it with its own "
            "search.epochs, or name another folder"
        )
    tuned = finetuned(output)
    decided = tuned or (output / ARCHITECTURE).exists() or any((output / STATE / "search").glob("*"))
    for phase, over in (("dense", decided), ("search", tuned)):
        changed = _changed(getattr(before, phase, None), getattr(options, phase, None))
        if over and changed is not None:
            raise RunFolderError(
                f"output {output} has gone on from its {phase} phase, which had {phase}.{changed}; continue it with "
                "that, or name another folder"
            )


def _way_to_decide(options: Any) -> str | None:
    """Return how a command decides what to keep; None when it does not."""
    searching = getattr(options, "search", None)
    if searching is None:
        return None
    return "a search" if searching.epochs > 0 else "scores, without a search"


def _changed(before: Any, settings: Any) -> str | None:
    """Return the first setting of a phase that differs, with its former value."""
    if before == settings:
        return None
    names = [field.name for field in dataclasses.fields(before)]
    name = next(name for name in names if getattr(before, name) != getattr(settings, name))
    return f"{name} {getattr(before, name)}"
