"""What mkdocs does to the pages besides rendering: it adds the reference, and leaves out links to other folders."""

import inspect
import posixpath
import re
from typing import Any

from mkdocs.structure.files import File, Files

import spvit

LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)[^)\s]*\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the page `reference.md`, which has every name of `spvit.__all__` with its docstring."""
    public = [getattr(spvit, name) for name in spvit.__all__]
    errors = [item for item in public if inspect.isclass(item) and issubclass(item, spvit.SpvitError)]
    classes = [item for item in public if inspect.isclass(item) and item not in errors]
    page = "# Reference\n\nThe names that `import spvit` offers. Everything else may change.\n"
    for title, group in (("Functions", [item for item in public if not inspect.isclass(item)]), ("Classes", classes)):
        page += f"\n## {title}\n\n" + "\n\n".join(f"::: {item.__module__}.{item.__qualname__}" for item in group) + "\n"
    page += "\n## Errors\n\n| error | when |\n|---|---|\n"
    page += "\n".join(f"| `spvit.{error.__name__}` | {error.__doc__} |" for error in errors) + "\n"
    files.append(File.generated(config, "reference.md", content=page))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Keep but the words of links that leave docs/ (`../benchmarks`), and of code blocks but the language."""

    def kept(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), link[2]))
        return link[1] if target.startswith("../") else link[0]

    return LINK.sub(kept, markdown.replace("```python no-test", "```python"))
