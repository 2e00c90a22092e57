"""The house: a file imports from the floors above it only, and importing spvit loads no model library."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import spvit

PACKAGE = Path(spvit.__file__).parent

# From the top floor down (shared/design.md); a file may import from its own floor's package and from floors above.
FLOORS = [
    "errors",
    "architecture",
    "gates",
    "kernels",
    "moments",
    "narrowing",
    "ranking",
    "cost",
    "budget",
    "pruned",
    "gated_linear",
    "searchable",
    "hosts",
    "blockwise",
    "repair",
    "attention_errors",
    "install",
    "surgery",
    "scores",
    "decide",
    "zoo",
    "checkpoint",
    "models",
    "benchmark",
    "train",
    "cli",
]
FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")
)
HEAVY = ("timm", "transformers", "torchvision", "matplotlib")


def _floor(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Return the dotted modules that a file imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "spvit" else {node.module}
            )
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_from_the_floors_above_only(path: Path) -> None:
    own = _floor(path)
    assert own in FLOORS, f"{own} has no floor yet: give it one in FLOORS and in the design"
    for module in _imports(path):
        if module.split(".")[0] != "spvit":
            continue
        other = module.split(".")[1]
        assert other in FLOORS, f"{path.name} imports {module} from the package's front door"
        same_package = other == own and path.parent != PACKAGE
        assert same_package or FLOORS.index(other) < FLOORS.index(own), f"{own} imports {module}, which is below it"


def test_hosts_files_import_only_their_base_and_what_their_library_shares() -> None:
    for path in (PACKAGE / "hosts").glob("*.py"):
        siblings = {module for module in _imports(path) if module.startswith("spvit.hosts")}
        shared = {"spvit.hosts.timm_models"} if path.stem in ("timm_vit", "timm_swin") else set()
        assert siblings <= {"spvit.hosts.base"} | shared, path.name
        if path.stem == "base":
            assert not siblings


def test_architecture_needs_the_standard_library_only() -> None:
    for module in _imports(PACKAGE / "architecture.py"):
        assert module.split(".")[0] in sys.stdlib_module_names


def test_losses_need_torch_and_spvit_only() -> None:
    roots = {module.split(".")[0] for module in _imports(PACKAGE / "train" / "losses.py")}
    assert roots <= {"__future__", "collections", "torch", "spvit"}


def test_importing_spvit_loads_no_model_library() -> None:
    code = f"import sys, spvit; print(sorted(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    assert sorted(spvit.__all__) == spvit.__all__
    for name in spvit.__all__:
        assert getattr(spvit, name).__module__.startswith("spvit."), name


def test_the_head_mix_softmax_has_one_owner() -> None:
    owners = [path.name for path in FILES if "softmax(head_logits" in path.read_text()]
    assert owners == ["kernels.py"]
