"""The parser of a command: jsonargparse reads options from dataclasses; spellings, help and messages are set here."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter, get_loader, set_loader, set_parsing_settings

from spvit.errors import SpvitError

_HEADINGS = {
    "model and data": ("model", "checkpoint", "data", "images.batch-size"),
    "budget, one of the two": ("macs", "params"),
    "what to do": (),
    "run": ("recipe", "output", "seed", "resume", "dry-run", "help", "help-all"),
}
_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "tuple": "a list such as [0.5, 1.0]",
    "dict": 'names with values such as {"img_size": 96}',
}


class CommandParser(ArgumentParser):
    """Options with dashes or underscores in their names; `--flag`, `--flag true` and `--no-flag` for yes and no."""

    shown: Sequence[str]
    """Options of the short help."""
    needed: dict[str, str]
    """What must be given, by key, as the user types it. The settings of a run to continue may give it too."""

    def add_argument(self, *names: str, **settings: Any) -> Any:
        """Add an option under both of its spellings."""
        if settings.get("type") is bool:
            del settings["type"]
            settings |= {"action": ActionYesNo(no_prefix="no-"), "nargs": "?"}
        dashed = [name.replace("_", "-") if name.startswith("--") else name for name in names]
        return super().add_argument(*dict.fromkeys([*dashed, *names]), **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise SpvitError with jsonargparse's message in plain words and one line."""
        raise SpvitError(self._in_plain_words(" ".join(message.split()))) from ex

    def _in_plain_words(self, message: str) -> str:
        if message.startswith('Parser key "'):
            key, _, reason = message.removeprefix('Parser key "').partition('":')
            expected = [words for name, words in _EXPECTED.items() if f"Expected a <class '{name}'>" in reason]
            found = f"is {reason.rpartition('alue: ')[2]}, expected {' or '.join(expected)}"
            return f"--{key.replace('_', '-')}{' ' + found if expected else ':' + reason}"
        message = message.replace("invalid _boolean_type value:", "expected true or false, found")
        unknown = ""
        if message.startswith("unrecognized arguments: "):
            unknown = message.split()[2].partition("=")[0]
        elif "accept" in message:  # a key of a recipe: Group 'search' does not accept option 'speed'
            unknown = "--" + ".".join(message.split("'")[1::2])
        near = difflib.get_close_matches(unknown, self._option_string_actions, n=1)
        return f"{message}; did you mean {near[0]}?" if near else message


class _ShortHelp(argparse.Action):
    """`--help`: print the options that the parser shows, and end."""

    def __call__(self, parser: Any, *_: Any) -> None:
        """Leave the parser, which is not used again, with those options alone."""
        shown = [*parser.shown, "help", "help-all"]
        headed = {name for names in _HEADINGS.values() for name in names}
        parser._action_groups = []
        for title, names in _HEADINGS.items():
            own = names or [name for name in shown if name not in headed]
            actions = [parser._option_string_actions.get(f"--{name}") for name in own if name in shown]
            parser.add_argument_group(title)._group_actions = [action for action in actions if action is not None]
        parser.print_help()
        parser.exit()


class Help(DefaultHelpFormatter):
    """Help with one spelling of an option, and without types and empty defaults."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        every = action.option_strings
        action.option_strings = [name for name in every if name.startswith("--")][:1]
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = every

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").rstrip(".")
        given = "" if action.default in (None, {}, argparse.SUPPRESS) else " (default: %(default)s)"
        return f"{text}{given}." if text else ""


def _plain_yaml(text: str) -> Any:
    """Read YAML as jsonargparse does, but for the names of classes, which it would import."""

    def names_code(value: Any) -> bool:
        if isinstance(value, dict):
            return "class_path" in value or any(map(names_code, value.values()))
        return isinstance(value, list) and any(map(names_code, value))

    settings = get_loader("yaml")(text)
    if names_code(settings):
        raise yaml.YAMLError("settings are numbers, text and lists; class_path would run code")
    return settings


def command_parser(
    name: str, options: type, summary: str = "", shown: Sequence[str] = (), defaults: Sequence[str] = ()
) -> CommandParser:
    """Return the parser of a command.

    Args:
        name: the command.
        options: dataclass of its options; those that are not keyword-only may be given in order, without names.
        summary: what it does; the options' docstring when empty.
        shown: options of its short help; all when empty.
        defaults: files of settings that stand in place of the defaults.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("plain_yaml", _plain_yaml, exceptions=(yaml.YAMLError,))
    parser = CommandParser(
        parser_mode="plain_yaml",
        prog=f"spvit {name}",
        description=summary or options.__doc__,
        epilog="A recipe holds the same names: images: {batch_size: 64}. Dashes and underscores are the same here.",
        formatter_class=Help,
        default_config_files=list(defaults),
        exit_on_error=False,
        allow_abbrev=False,
        add_help=False,
        print_config=None,
    )
    parser.add_argument(
        "--recipe", action="config", help="YAML file with any of these settings; of several, later ones win."
    )
    parser.add_class_arguments(options, None, as_group=False, as_positional=True)
    if name == "profile":
        parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, help="The same as --model.")
    if "train-epochs" in shown:
        zero = {"dest": "train_epochs", "action": "store_const", "const": 0, "default": argparse.SUPPRESS}
        parser.add_argument("--no-train", "--no_train", **zero, help="Train nothing: --train-epochs 0.")
    if shown:
        parser.add_argument("--help", "-h", action=_ShortHelp, nargs=0, default=argparse.SUPPRESS, help="Show this.")
        parser.add_argument("--help-all", action="help", help="List every option, those of each phase too.")
    else:
        parser.add_argument("--help", "-h", "--help-all", action="help", help="Show this.")
    parser.shown = shown
    parser.needed = {
        action.dest: (action.option_strings or [action.dest.upper()])[0]
        for action in parser._actions
        if action.required
    }
    for action in parser._actions:
        action.required = False
    words = [word if word.isupper() else f"{word} {word[2:].upper()}" for word in parser.needed.values()]
    parser.usage = " ".join([parser.prog, *(words if not defaults else []), "[options]"])
    return parser
