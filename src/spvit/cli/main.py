"""The command `spvit`: one function a sub-command, one line for what goes wrong.

Exit codes: 0 done, 1 a run failed, 2 bad usage or input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings
from rich.console import Console
from rich.logging import RichHandler

from spvit.cli.commands import (
    compress_command,
    convert_command,
    demo_command,
    evaluate_command,
    finetune_command,
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
from spvit.errors import DataError, RunError, SpvitError
from spvit.train.processes import processes
from spvit.train.run_folder import RunFolder


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
    except SpvitError as error:
        return _complain(problems, error, 1 if isinstance(error, RunError) else 2)
    except argparse.ArgumentError as error:
        return _complain(problems, DataError(_as_options(error)), 2)
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
        output = _folder_to_resume(arguments)
        if output is None:
            raise
        name, options = arguments[0], None
    if output is None:
        return name, options
    folder = RunFolder.open(output, resume=True)
    stored = folder.settings_of(name)
    _, before = _parse([name, "--recipe", str(stored), "--resume", "true"])
    # The run's own settings come first, so that what is given now takes precedence over them.
    _, options = _parse([name, "--recipe", str(stored), *arguments[1:]])
    folder.check_continued(before, options)
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
    with RunFolder(options.output).removed_if_refused() if writes else nullcontext():
        run(options, console)


def _folder_to_resume(arguments: list[str]) -> str | None:
    """Return the output folder when a command line's own words ask to resume it; None otherwise."""
    words = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    words.add_argument("--output")
    words.add_argument("--resume", nargs="?", const="true", default="false")
    known, _ = words.parse_known_args(arguments[1:])
    return known.output if yaml.safe_load(known.resume) is True else None
