"""Recipes before they are read: a key that stands twice is refused, and each key has a line to name in a message."""

from __future__ import annotations

from pathlib import Path

import yaml

from spvit.errors import SpvitError


def lines_of(recipe: str | Path) -> dict[str, int]:
    """Return the line of every key of a recipe by its dotted name; none of a file that is not there.

    Raises SpvitError with file and line when the file is no YAML, no names with values, or a key stands twice in it.
    """
    if not Path(recipe).is_file():
        return {}
    lines: dict[str, int] = {}

    def read(node: yaml.Node | None, prefix: str) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            name, line = f"{prefix}{key.value}".replace("-", "_"), key.start_mark.line + 1
            if name in lines:
                raise SpvitError(
                    f"{recipe}, line {line}: {name} is set on line {lines[name]} already; keep one of them"
                )
            lines[name] = line
            read(value, f"{name}.")

    try:
        found = yaml.compose(Path(recipe).read_text(encoding="utf-8"), yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        where = f", line {mark.line + 1}" if mark else ""
        raise SpvitError(f"{recipe}{where}: no YAML: {problem}") from error
    except UnicodeDecodeError as error:
        raise SpvitError(f"{recipe} is no text: {error}") from error
    if not isinstance(found, yaml.MappingNode):
        kind = "empty" if found is None else "a list" if isinstance(found, yaml.SequenceNode) else "a word"
        raise SpvitError(f"{recipe} is {kind}, expected names with values such as seed: 0")
    read(found, "")
    return lines
