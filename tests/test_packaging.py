"""The package says what it needs, and that is what was tested."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).parents[1]


def test_lower_bounds_are_the_oldest_set_that_is_tested() -> None:
    needed = re.search(r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    hugging_face = re.search(r"^hf = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    bounds = re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)"', needed[1] + hugging_face[1])
    tested = re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / ".ci" / "oldest.txt").read_text(), re.MULTILINE)
    assert {name: Version(bound) for name, bound in bounds} == {name: Version(own) for name, own in tested}
