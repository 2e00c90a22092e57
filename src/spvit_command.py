"""Where the command `spvit` starts: what needs no model is answered before spvit, and with it torch, is imported.

Nothing else belongs here. `python -m spvit_command` is the command, for launchers such as torchrun; of `python -m
spvit.cli` Python imports spvit first, so that Ctrl-C within its first seconds ends in a traceback.
"""

import ast
import difflib
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

_OPTIONS = Path(__file__).parent / "spvit" / "cli" / "options.py"


def main() -> int:
    """Run the command line and return the exit code."""
    try:
        try:
            return _run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # what read the output has ended, as head does; Python flushes once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run() -> int:
    # Until the command handles signals itself: an exception within an import might be taken for a missing library.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _end)
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    if first == "--version":
        print(f"spvit {version('spvit')}")
        return 0
    commands = _commands()
    if first in ("--help", "-h"):
        width = max(map(len, commands)) + 2
        print("usage: spvit COMMAND [options]\n\nCompress a vision transformer to a budget.\n")
        print(*(f"  {name:{width}}{about}" for name, about in commands.items()), sep="\n")
        print("\nspvit COMMAND --help lists a command's options; spvit --version prints the version.")
        return 0
    if first not in commands:
        near = difflib.get_close_matches(first, commands, n=1)
        found = f"{first!r} is no command" if first else "a command is missing"
        hint = f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(commands)}"
        print(f"spvit: {found}{hint}", file=sys.stderr)
        return 2
    from spvit.cli.main import main as run

    return run()


def _end(number: int, _: object) -> None:
    os.write(2, b"spvit: interrupted\n")
    os._exit(128 + number)


def _commands() -> dict[str, str]:
    """Return what each command does, by its name: the docstrings of the options' classes, which are not imported."""
    text = _OPTIONS.read_text(encoding="utf-8")
    classes = [
        node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name.endswith("Command")
    ]
    return {
        node.name.removesuffix("Command").lower(): (ast.get_docstring(node) or "").split("\n\n")[0]
        for node in classes
        if node.name != "RunCommand"
    }


if __name__ == "__main__":
    sys.exit(main())
