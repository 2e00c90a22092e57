"""The parser of a command: jsonargparse reads options from dataclasses; spellings, help and messages are set here."""

from __future__ import annotations

import argparse
import copy
import difflib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from spvit.cli.recipes import lines_of
from spvit.errors import SpvitError

DEMO = Path(__file__).with_name("digits.yaml")
# Options of the short help.
_HEADINGS = {
    "model and data": ("model", "checkpoint", "data", "images.batch-size"),
    "budget, one of these": ("macs", "params", "latency"),
    "budgets": ("budgets", "metric"),
    "what may change": ("keep", "only", "forbid"),
    "what to write": ("to", "int8", "fp16", "most-drop", "opset", "with-preprocessing", "dynamic-size", "overwrite"),
    "what to do": ("architecture", "scores", "epochs", "minutes", "no-train"),
    "run": ("recipe", "output", "device", "seed", "resume", "dry-run", "help", "help-all"),
}
_ALSO_IN_ORDER = {"benchmark": "models", **dict.fromkeys(("profile", "check", "export", "frontier"), "model")}
"""Options that may be given without their name."""
_SHOWN_OF_DEMO = ("macs", "output", "seed", "resume", "help", "help-all")
_SEVERAL = ("--keep", "--only", "--forbid", "--track")
"""Options that take several words as one text."""
_LISTS = ("--budgets", "--batches", "--models")
"""Options that take a list, of which the words are the items."""
_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "tuple": "a list such as [0.5, 1.0]",
    "dict": 'names with values such as {"img_size": 96}',
}


class CommandParser(ArgumentParser):
    """Options with dashes or underscores in their names; `--flag`, `--flag true` and `--no-flag` for yes and no."""

    needed: dict[str, str]
    """What must be given, by key, as the user types it. The settings of a run to continue may give it too."""
    _lines: dict[str, dict[str, int]] = {}  # noqa: RUF012
    _typed: set[str] = set()  # noqa: RUF012

    def add_argument(self, *names: str, **settings: Any) -> Any:
        """Add an option under both of its spellings."""
        if settings.get("type") is bool:
            del settings["type"]
            settings |= {"action": ActionYesNo(no_prefix="no-"), "nargs": "?"}
        dashed = [name.replace("_", "-") if name.startswith("--") else name for name in names]
        return super().add_argument(*dict.fromkeys([*dashed, *names]), **settings)

    def parse_args(self, args: Sequence[str], **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse as jsonargparse does. Raises SpvitError: an option or value is wrong, or names code to import."""
        _check_contradictions(args)
        options = [word.partition("=")[0] for word in args]
        continued = {} if kwargs.get("namespace") is None else self._lines  # what was read before counts on
        self._lines = continued | {recipe: lines_of(recipe) for recipe in given(args, "--recipe")}
        have = self._option_string_actions
        self._typed = {have[option].dest for option in options if option in have}
        if (where := self._where("no_train")) and "--no-train" in have:
            raise SpvitError(f"{where}no_train is for the command line; write epochs: 0")
        try:
            return super().parse_args(_joined(args), **kwargs)
        except ImportError as error:
            raise SpvitError(f"a setting names code, which is never run: {error}") from error

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise SpvitError with jsonargparse's message in plain words and one line."""
        raise SpvitError(self._in_plain_words(" ".join(message.split()))) from ex

    def _in_plain_words(self, message: str) -> str:
        if message.startswith('Parser key "'):
            key, _, reason = message.removeprefix('Parser key "').partition('":')
            expected = [words for name, words in _EXPECTED.items() if f"Expected a <class '{name}'>" in reason]
            found = f"is {reason.rpartition('alue: ')[2]}, expected {' or '.join(expected)}"
            return f"{self._where(key)}--{key.replace('_', '-')}{' ' + found if expected else ':' + reason}"
        message = message.replace("invalid _boolean_type value:", "expected true or false, found")
        unknown = ""
        if message.startswith("unrecognized arguments: "):
            unknown = message.split()[2].partition("=")[0]
        elif "accept" in message:  # a key of a recipe: Group 'search' does not accept option 'speed'
            unknown = "--" + ".".join(message.split("'")[1::2])
            message = self._where(unknown[2:]) + message
        near = difflib.get_close_matches(unknown, self._option_string_actions, n=1)
        return f"{message}; did you mean {near[0]}?" if near else message

    def placed(self, error: SpvitError) -> SpvitError:
        """Return an error of settings behind the recipe and line of the setting that it begins with, if it has one."""
        first, _, given = str(error).partition(", found ")
        names = re.findall(r"[\w.]+", given if first.startswith("a budget is one of") else first.partition(" ")[0])
        where = next(filter(None, map(self._where, names)), "")
        return type(error)(f"{where}{error}")

    def _where(self, key: str) -> str:
        """Return the recipe and line that set a key, if one did and no option did."""
        lines = [f"{recipe}, line {own[key]}: " for recipe, own in self._lines.items() if key in own]
        return lines[-1] if lines and key not in self._typed else ""


def given(words: Sequence[str], option: str) -> list[str]:
    """Return what is given for an option, each time."""
    after = [value for word, value in itertools.pairwise(words) if word == option]
    return [*after, *(word.partition("=")[2] for word in words if word.startswith(f"{option}="))]


def _check_contradictions(words: Sequence[str]) -> None:
    """Raise SpvitError when two options say how long to fine-tune."""
    spelled = {word.partition("=")[0].replace("_", "-") for word in words}
    found = [option for option in ("--no-train", "--epochs", "--finetune.epochs") if option in spelled]
    if len(found) > 1:
        raise SpvitError(f"{' and '.join(found)} contradict each other; give one of them")


def _joined(words: Sequence[str]) -> list[str]:
    """Return words with those after an option that takes several as one: `--keep=0 -1`, `--batches=[1,64]`."""
    joined: list[str] = []
    for word in words:
        option = joined[-1].partition("=")[0] if joined else ""
        if option in (*_SEVERAL, *_LISTS) and not word.startswith("--"):
            joined[-1] += f"{' ' if '=' in joined[-1] else '='}{word}"
        elif option.startswith("--") and option == joined[-1] and word[1:2].isdigit() and word.endswith("%"):
            joined[-1] += f"={word}"  # -50%, which argparse takes for an option
        else:
            joined.append(word)
    pairs = [(word, *word.partition("=")[::2]) for word in joined]
    return [
        f"{name}=[{','.join(items.strip('[]').replace(',', ' ').split())}]" if name in _LISTS else word
        for word, name, items in pairs
    ]


class _ShortHelp(argparse.Action):
    """`--help`: print the options that most people need, and end."""

    def __call__(self, parser: Any, *_: Any) -> None:
        """Leave the parser, which is not used again, with those options alone."""
        have, demo = parser._option_string_actions, bool(parser.default_config_files)
        parser._action_groups = []
        for title, names in _HEADINGS.items():
            own = [name for name in names if f"--{name}" in have and (not demo or name in _SHOWN_OF_DEMO)]
            parser.add_argument_group(title)._group_actions = [have[f"--{name}"] for name in own]
        parser.print_help()
        parser.exit()


class Help(DefaultHelpFormatter):
    """Help with one spelling of an option, and without types and empty defaults."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [name for name in action.option_strings if name.startswith("--")][:1]
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").rstrip(".")
        given = "" if action.default in (None, {}, argparse.SUPPRESS) else " (default: %(default)s)"
        return f"{text}{given}." if text else ""


def command_parser(name: str, options: type) -> CommandParser:
    """Return the parser of a command, whose options are a dataclass; those not keyword-only may be given in order."""
    set_parsing_settings(
        docstring_parse_attribute_docstrings=True,
        instantiate_subclass_spec_in_any=False,  # nothing in a recipe is imported or run
        import_path_denylist=["*"],
    )
    parser = CommandParser(
        prog=f"spvit {name}",
        description=options.__doc__,
        epilog="A recipe holds the same names: images: {batch_size: 64}. Dashes and underscores are the same.",
        formatter_class=Help,
        default_config_files=[DEMO] if name == "demo" else [],
        exit_on_error=False,
        allow_abbrev=False,
        add_help=False,
        print_config=None,
    )
    parser.add_argument("--recipe", action="config", help="YAML file of settings; later files take precedence.")
    in_order = {"model", "files"} if name == "predict" else set()
    parser.add_class_arguments(options, None, as_group=False, as_positional=True, skip=in_order)
    have = parser._option_string_actions
    also = _ALSO_IN_ORDER.get(name, "")
    if also:
        number = "*" if also == "models" else "?"
        parser.add_argument(also, nargs=number, default=argparse.SUPPRESS, help=f"The same as --{also}.")
    elif name == "predict":
        parser.add_argument("model", help="A folder that spvit wrote, or another model as for compress.")
        parser.add_argument("files", nargs="+", help="Image files, or folders of them.")
    if "--epochs" in have:
        zero = {"dest": "epochs", "action": "store_const", "const": 0, "default": argparse.SUPPRESS}
        parser.add_argument("--no-train", "--no_train", **zero, help="Train nothing: --epochs 0.")
    for option in [] if "--epochs" in have else [name for name in have if name.endswith((".epochs", ".minutes"))]:
        short = f"--{option.partition('.')[2]}"  # of a command that trains in one phase
        have[short] = have[option]
        have[short].option_strings = [short, *have[short].option_strings]
    if "--data" in have:
        parser.add_argument("--help", "-h", action=_ShortHelp, nargs=0, default=argparse.SUPPRESS, help="Show this.")
        parser.add_argument("--help-all", action="help", help="List every option, those of each phase too.")
    else:
        parser.add_argument("--help", "-h", "--help-all", action="help", help="Show this.")
    required = [action for action in parser._actions if action.required]
    parser.needed = {action.dest: (action.option_strings or [action.dest.upper()])[0] for action in required}
    for action in required:
        action.required = False
    bare = {word: word.removeprefix("--").upper() for word in parser.needed.values()}
    words = [own if word in (own, f"--{also}") else f"{word} {own}" for word, own in bare.items()]
    parser.usage = " ".join([parser.prog, *(words if name != "demo" else []), "[options]"])
    return parser
