"""The house: a file imports from its own room and from rooms above, and importing spvit loads no model library."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import spvit

PACKAGE = Path(spvit.__file__).parent

# From the top down; files of one line are one floor, and may import each other if that makes no circle.
FLOORS = (
    ("errors", "fields", "architecture", "budget", "cost", "moments"),
    ("hosts",),
    ("replacements",),
    ("repair",),
    ("search",),
    ("surgery", "decide", "hub", "checkpoint", "models", "zoo", "runtimes", "speed"),
    ("train",),
    ("pages",),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FRONT = ("__init__.py", "__main__.py")
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name not in FRONT)
HEAVY = ("timm", "transformers", "torchvision", "matplotlib", "jinja2", "accelerate", "torch_pruning", "sklearn")
MOST_ROOMS = 21
MOST_LINES = 400


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _name(path: Path) -> str:
    """Return the dotted name of a file's module inside the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {_name(path) for path in FILES}


@functools.cache
def _imports(path: Path) -> set[str]:
    """Return the dotted modules that a file imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner.removeprefix("spvit.") in NAMES else f"{node.module}")
    return found


def _own_imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, without its front door's name."""
    return {module.removeprefix("spvit.") for module in _imports(path) if module.split(".")[0] == "spvit"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_from_its_own_room_and_rooms_above_only(path: Path) -> None:
    own = _room(path)
    assert own in FLOOR_OF, f"{own} has no floor yet: give it one in FLOORS and in the design"
    for module in _own_imports(path):
        other = module.split(".")[0]
        assert other != "spvit", f"{path.name} imports from the package's front door"
        assert FLOOR_OF[other] <= FLOOR_OF[own], f"{own} imports {module}, which is below it"


def test_no_files_import_each_other_in_a_circle() -> None:
    names = {_name(path): path for path in FILES}
    imports = {
        name: {module for module in _own_imports(path) if module in names} - {name} for name, path in names.items()
    }
    while imports:
        free = {name for name, needed in imports.items() if not needed & imports.keys()}
        assert free, f"a circle of imports among {sorted(imports)}"
        imports = {name: needed for name, needed in imports.items() if name not in free}


def test_the_house_stays_small() -> None:
    assert len({_room(path) for path in FILES}) <= MOST_ROOMS
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_families_do_not_know_each_other() -> None:
    families = {path.stem for path in (PACKAGE / "hosts").glob("*.py") if "\ndef family(" in path.read_text()}
    assert {"timm_vit", "timm_swin"} <= families
    for path in (PACKAGE / "hosts").glob("*.py"):
        assert not {f"hosts.{family}" for family in families} & _own_imports(path), path.name


def test_kinds_of_replacements_are_known_by_the_registry_alone() -> None:
    """A new kind is a new file and a line: nothing above may name the files, and each other they do not know."""
    kinds = {path.stem for path in (PACKAGE / "replacements").glob("*.py") if "REPLACEMENT = " in path.read_text()}
    assert {"narrow", "skip"} <= kinds
    for name in ("hosts", "architecture.py", "cost.py", "repair/repair.py", "repair/choose.py", "decide.py"):
        paths = [PACKAGE / name] if name.endswith(".py") else list((PACKAGE / name).glob("*.py"))
        for path in paths:
            assert not {f"replacements.{kind}" for kind in (*kinds, "bottleneck")} & _own_imports(path), path.name


@pytest.mark.parametrize("name", ["architecture", "errors", "fields"])
def test_data_needs_the_standard_library_only(name: str) -> None:
    for module in _imports(PACKAGE / f"{name}.py"):
        assert module.split(".")[0] in {*sys.stdlib_module_names} or module in ("spvit.errors", "spvit.fields"), module


def test_losses_of_training_need_torch_and_spvit_only() -> None:
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
    with pytest.raises(AttributeError, match="module 'spvit' has no attribute 'supernet'"):
        spvit.supernet  # noqa: B018


def test_every_error_is_public_and_has_one_base() -> None:
    tree = ast.parse((PACKAGE / "errors.py").read_text())
    errors = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert errors <= set(spvit.__all__)
    assert all(issubclass(getattr(spvit, name), spvit.SpvitError) for name in errors)
    for path in FILES:
        defined = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)}
        assert path.name == "errors.py" or not {name for name in defined if name.endswith("Error")}, path.name


def test_the_head_mix_softmax_has_one_owner() -> None:
    owners = [path.name for path in FILES if "softmax(head_logits" in path.read_text()]
    assert owners == ["kernels.py"]


def test_no_test_imports_another_test() -> None:
    for path in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(module.split(".")[-1].startswith("test_") for module in modules), path.name
