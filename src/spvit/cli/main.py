"""The command `spvit`: words become settings, a function runs, and what goes wrong takes one line.

Exit codes: 0 done, 1 a run failed, 2 bad usage or input; 128 and the signal's number when one ended it: 130 Ctrl-C,
143 SIGTERM, 138 SIGUSR1, 141 when what reads the output has ended.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NoReturn, get_type_hints

from jsonargparse import Namespace
from rich.console import Console
from rich.logging import RichHandler

from spvit.cli import commands as run
from spvit.cli import options as cli
from spvit.cli.benchmark import benchmark_command
from spvit.cli.check import check_command
from spvit.cli.export import export_command
from spvit.cli.frontier import frontier_command
from spvit.cli.parser import CommandParser, command_parser
from spvit.cli.predict import predict_command
from spvit.cli.push import push_command
from spvit.cli.report import report_command
from spvit.cli.show import say
from spvit.errors import RunError, RunStoppedError, SpvitError
from spvit.models import names_code
from spvit.train.processes import is_first_to_fail, processes, use_device, who_is_gone
from spvit.train.run_folder import DENSE, FINETUNE, REPAIR, SCORE, SEARCH, RunFolder
from spvit.train.settings import PhaseConfig
from spvit.train.signals import STOPPING, time_limit

COMMANDS: dict[str, tuple[Any, Callable[..., None]]] = {  # the options and the function of each
    "compress": (cli.CompressCommand, run.compress_command),
    "train": (cli.TrainCommand, run.train_command),
    "search": (cli.SearchCommand, run.search_command),
    "finetune": (cli.FinetuneCommand, run.finetune_command),
    "evaluate": (cli.EvaluateCommand, run.evaluate_command),
    "predict": (cli.PredictCommand, predict_command),
    "profile": (cli.ProfileCommand, run.profile_command),
    "check": (cli.CheckCommand, check_command),
    "frontier": (cli.FrontierCommand, frontier_command),
    "benchmark": (cli.BenchmarkCommand, benchmark_command),
    "report": (cli.ReportCommand, report_command),
    "export": (cli.ExportCommand, export_command),
    "push": (cli.PushCommand, push_command),
    "convert": (cli.ConvertCommand, run.convert_command),
    "demo": (cli.DemoCommand, run.compress_command),
}
ADVICE = "a run that has saved a state continues with --resume"


class _Output(Console):
    def on_broken_pipe(self) -> NoReturn:
        """End without a word, as SIGPIPE ends other commands: nobody reads the output any more."""
        raise SystemExit(128 + signal.SIGPIPE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, of which `spvit_command` has seen that there is one, and return the exit code."""
    problems, failure = Console(stderr=True), None
    before = _stop_by_exception()
    try:
        try:
            _command(list(sys.argv[1:] if arguments is None else arguments), problems)
        except BaseException as error:
            failure = error
        for number in before:  # it ends as it is: a launcher that ends it does not cut short what it says
            signal.signal(number, signal.SIG_IGN)
        code, message = (0, "") if failure is None else _explained(failure)
        if message and is_first_to_fail():
            line = f"spvit: {' '.join(message.split())}"
            problems.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
        return code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _explained(error: BaseException) -> tuple[int, str]:
    """Return the exit code and what went wrong in words; raise what is no user's to know."""
    if isinstance(error, RunStoppedError):
        return 128 + error.number, str(error)
    if isinstance(error, SpvitError):  # one in a reading process arrives as its traceback, with the message last
        return 1 if isinstance(error, RunError) else 2, str(error).split("DataError: ")[-1]
    if isinstance(error, OSError):  # a full disk, a folder that may not be written, one that has gone
        return 1, _in_words(error)
    if isinstance(error, RuntimeError) and (gone := who_is_gone(error)):
        return 1, f"{gone}; {ADVICE}"
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.args[0] if error.args else signal.SIGINT), f"interrupted; {ADVICE}"
    raise error


def _in_words(error: OSError) -> str:
    return f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}"


def _stop_by_exception() -> dict[int, Any]:
    """Let SIGINT, SIGTERM and SIGUSR1 raise KeyboardInterrupt with their number; return what handled them before."""

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, stop) for number in (signal.SIGINT, *STOPPING)}


def _command(arguments: list[str], problems: Console) -> None:
    _quiet_libraries(problems)
    try:
        name, options = parse(arguments)
    except SpvitError:
        processes()  # which meet, so that one of them says it
        raise
    device = None if name == "benchmark" else getattr(options, "device", None)
    console = _Output(quiet=not processes(device == "cpu").is_main_process)  # one reports progress
    use_device(device)
    writes = isinstance(options, cli.RunCommand) and not getattr(options, "dry_run", False)
    hours = getattr(options, "max_hours", None)
    folder = RunFolder(options.output) if writes else None
    try:
        with folder.held() if folder else nullcontext(), time_limit(hours, partial(say, console)):
            COMMANDS[name][1](options, console)
    except OSError as error:
        if folder and any(map(folder.has_begun, (DENSE, SCORE, SEARCH, REPAIR, FINETUNE))):
            raise RunError(f"{_in_words(error)}; the last saved state is as it was") from error
        raise
    processes().destroy_process_group()  # or its threads may end the interpreter with an error


def parse(arguments: Sequence[str]) -> tuple[str, Any]:
    """Return the command's name, which is one of COMMANDS, and its options.

    Raises SpvitError when an option or a value is not known or missing, and RunFolderError for `--resume` on a folder
    whose run had other settings, or none.
    """
    name, *words = arguments
    parser = command_parser(name, COMMANDS[name][0])
    values = parser.parse_args(words)
    if not (values.get("resume") and values.get("output")):
        return name, _typed(_options(name, parser, values), words)
    folder = RunFolder.open(values.output, resume=True)
    settings, kept = folder.settings_of("compress" if name == "demo" else name)
    # The run's own settings come first, so that what is given now takes precedence over them.
    own = parser.parse_args(["--recipe", str(settings)])
    options = _options(name, parser, parser.parse_args(words, namespace=own))
    folder.check_continued(_options(name, parser, parser.parse_args(["--recipe", str(kept)])), options)
    return name, _typed(options, words)


def _typed(options: Any, words: Sequence[str]) -> Any:
    """Return options. Raises SpvitError when a file, and not the command line, names code as the model."""
    model = getattr(options, "model", None) or ""
    if names_code(model) and not any(word.partition("=")[2] == model or word == model for word in words):
        raise SpvitError(f"model {model} names code, which no file may; type it: --model {model}")
    return options


def _options(name: str, parser: CommandParser, values: Namespace) -> Any:
    missing = [words for key, words in parser.needed.items() if values.get(key) is None]
    if missing:
        raise SpvitError(f"the following options are required: {', '.join(missing)}; see {parser.prog} --help")
    options = COMMANDS[name][0]
    try:
        _check_phases(options, values)
        made = parser.instantiate(values)
        found = options(**{field.name: made[field.name] for field in dataclasses.fields(options)})
        if isinstance(found, cli.BudgetOptions):
            found.budget()
    except SpvitError as error:
        raise parser.placed(error) from error
    return found


def _check_phases(options: Any, values: Namespace) -> None:
    """Raise SpvitError naming the first phase whose settings are wrong, which they do not know themselves."""
    for name, kind in get_type_hints(options).items():
        if not (isinstance(kind, type) and issubclass(kind, PhaseConfig)):
            continue
        try:
            kind(**vars(values[name]))
        except SpvitError as error:
            known = str(error).partition(" ")[0] in vars(values[name])
            raise type(error)(f"{name}{'.' if known else ': '}{error}") from error


def _quiet_libraries(problems: Console) -> None:
    """Send our own warnings to one line each; keep libraries' advice to programmers off the terminal."""
    handler = RichHandler(console=problems, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    for library in (
        "accelerate",
        "huggingface_hub",
        "timm",
        "torch._dynamo",
        "torch.utils.cpp_extension",
        "transformers",
    ):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
