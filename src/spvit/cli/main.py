"""The command `spvit`: one function a sub-command, one line for what goes wrong.

Exit codes: 0 done, 1 a run failed, 2 bad usage or input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings
from rich.console import Console
from rich.logging import RichHandler

from spvit.cli.commands import (
    SETTINGS,
    compress_command,
    convert_command,
    demo_command,
    evaluate_command,
    finetune_command,
    heading,
    profile_command,
    search_command,
    train_command,
)
from spvit.cli.options import (
    CompressCommand,
    ConvertCommand,
    DemoCommand,
    EvaluateCommand,
    FinetuneCommand,
    ProfileCommand,
    RunCommand,
    SearchCommand,
    TrainCommand,
)
from spvit.cli.resuming import check_continued, folder_to_resume
from spvit.errors import (
    ArchitectureError,
    BudgetError,
    CalibrationError,
    CheckpointError,
    DataError,
    ModelError,
    NotSearchableError,
    RunError,
    RunFolderError,
    UnsupportedHostError,
    ZooError,
)
from spvit.train.compress import check_folder, holds_files
from spvit.train.processes import processes

InputErrors = (
    ArchitectureError,
    BudgetError,
    CalibrationError,
    CheckpointError,
    DataError,
    ModelError,
    NotSearchableError,
    RunFolderError,
    UnsupportedHostError,
    ZooError,
)


@dataclass(frozen=True)
class Command:
    """A sub-command: its options and what it does."""

    options: type
    run: Callable[[Any, Console], None]
    positional: bool = False
    """Whether the options that must be given are words in order, not named."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    # Of several processes one reports; each says what went wrong with it.
    console, problems = Console(quiet=not processes().is_main_process), Console(stderr=True)
    _quiet_libraries(problems)
    try:
        name, options = parse(_spelled_out(sys.argv[1:] if arguments is None else arguments))
        _guarded(commands()[name].run, options, console)
    except InputErrors as error:
        return _complain(problems, error, 2)
    except argparse.ArgumentError as error:
        return _complain(problems, DataError(_as_options(error)), 2)
    except RunError as error:
        return _complain(problems, error, 1)
    except KeyboardInterrupt:
        return _complain(problems, RunError("interrupted; a run that has saved a state continues with --resume"), 130)
    return 0


def commands() -> dict[str, Command]:
    """Return the sub-commands by name."""
    return {
        "compress": Command(CompressCommand, compress_command),
        "train": Command(TrainCommand, train_command),
        "search": Command(SearchCommand, search_command),
        "finetune": Command(FinetuneCommand, finetune_command),
        "evaluate": Command(EvaluateCommand, evaluate_command),
        "profile": Command(ProfileCommand, profile_command),
        "convert": Command(ConvertCommand, convert_command, positional=True),
        "demo": Command(DemoCommand, demo_command),
    }


def parse(arguments: list[str]) -> tuple[str, Any]:
    """Return the sub-command's name and its options.

    Raises:
        argparse.ArgumentError: an option or a value is not known.
        RunFolderError: `--resume` on a folder whose run had other settings, or none.
    """
    try:
        name, options = _parse(arguments)
        output = options.output if getattr(options, "resume", False) else None
    except argparse.ArgumentError:
        # What is missing may stand in the settings of the run to continue.
        output = folder_to_resume(arguments)
        if output is None:
            raise
        name, options = arguments[0], None
    if output is None:
        return name, options
    stored = check_folder(output, resume=True) / SETTINGS
    if not stored.is_file():
        raise RunFolderError(f"output {output} holds no {SETTINGS}, so its run cannot be continued")
    first = stored.read_text(encoding="utf-8").splitlines()[0]
    if first != heading(name):
        raise RunFolderError(f"output {output} holds a run of {first[2:]!r}, not of 'spvit {name}'")
    _, before = _parse([name, "--recipe", str(stored), "--resume", "true"])
    # The run's own settings come first, so that what is given now takes precedence over them.
    _, options = _parse([name, "--recipe", str(stored), *arguments[1:]])
    check_continued(stored.parent, before, options)
    return name, options


def _parse(arguments: list[str]) -> tuple[str, Any]:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="spvit", exit_on_error=False, description="Compress a vision transformer to a budget.")
    subcommands = parser.add_subcommands(dest="command", required=True, metavar="COMMAND")
    for name, command in commands().items():
        summary = (command.options.__doc__ or "").strip()
        child = ArgumentParser(exit_on_error=False, description=summary)
        child.add_argument("--recipe", action="config", help="YAML file with any of these settings.")
        child.add_class_arguments(command.options, None, as_positional=command.positional)
        subcommands.add_subcommand(name, child, help=summary)
    values = parser.instantiate(parser.parse_args(_flags_alone(_model_first(arguments))))
    chosen = values[values.command]
    options = commands()[values.command].options
    return values.command, options(**{field.name: chosen[field.name] for field in dataclasses.fields(options)})


def _spelled_out(arguments: Sequence[str]) -> list[str]:
    """Return the words with dashes inside option names as underscores, and --no-train as what it stands for."""
    words = []
    for word in arguments:
        name, sign, value = word.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
        words.append("--train_epochs=0" if name == "--no_train" and not sign else name + sign + value)
    return words


def _flags_alone(arguments: list[str]) -> list[str]:
    """Let `--resume` and `--dry-run` before another option stand for `--resume true` and `--dry-run true`."""
    following = [*arguments[1:], "--"]
    return [
        f"{word}=true" if word in ("--resume", "--dry_run") and after.startswith("--") else word
        for word, after in zip(arguments, following)
    ]


def _model_first(arguments: list[str]) -> list[str]:
    """Let `spvit profile NAME` stand for `spvit profile --model NAME`."""
    bare = arguments[:1] == ["profile"] and len(arguments) > 1 and not arguments[1].startswith("-")
    return [arguments[0], "--model", *arguments[1:]] if bare else arguments


def _as_options(error: argparse.ArgumentError) -> str:
    """Return jsonargparse's message with its keys written as the options that a user types."""
    text = " ".join(str(error).split())
    if "arguments are required: " in text:  # elsewhere `search.` is the group of settings, not the command
        text = re.sub(rf"(?<![\w.])({'|'.join(commands())})\.(\w+)", _as_option, text)
    return re.sub(r'Parser key "([\w.]+)":', r"--\1:", text)


def _as_option(key: re.Match[str]) -> str:
    """Return a key of jsonargparse, `command.name`, as the user types it."""
    command = commands()[key[1]]
    absent = dataclasses.MISSING
    fields = dataclasses.fields(command.options)
    needed = [field.name for field in fields if field.default is absent and field.default_factory is absent]
    return key[2].upper() if command.positional and key[2] in needed else f"--{key[2]}"


def _quiet_libraries(problems: Console) -> None:
    """Send our own warnings to one line each; keep libraries' advice to programmers off the terminal."""
    handler = RichHandler(console=problems, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    for library in ("accelerate", "huggingface_hub", "timm", "torch.utils.cpp_extension", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def _complain(problems: Console, error: Exception, code: int) -> int:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # An error in a reading process arrives as its traceback, with the message last.
    text = lines[-1].split("DataError: ")[-1] if isinstance(error, DataError) and lines else " ".join(lines)
    problems.print(f"spvit: {text}", style="red", highlight=False, markup=False, soft_wrap=True)
    return code


def _guarded(run: Callable[[Any, Console], None], options: Any, console: Console) -> None:
    """Run a command; when its input turns out to be bad before it has produced anything, leave no run folder behind."""
    writes = isinstance(options, (RunCommand, DemoCommand)) and not getattr(options, "dry_run", False)
    output = Path(options.output) if writes else None
    fresh = output is not None and not holds_files(output)
    try:
        run(options, console)
    except InputErrors:
        if output is not None and fresh and not _produced(output):
            shutil.rmtree(output, ignore_errors=True)
        raise


def _produced(output: Path) -> bool:
    """Return whether a run folder holds more than its settings."""
    return any(path.is_file() and path.name != SETTINGS for path in output.rglob("*"))
