"""Rules of the code's layout: imports go one way, importing loads little, and the wheel holds the whole package."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mogle_rt

pytestmark = pytest.mark.quick

ROOT = Path(mogle_rt.__file__).parent

# Rooms, from the ground up: each imports only from the ones before it. A room is a folder or a module of mogle_rt.
ROOMS = [
    "errors",
    "installed",
    "values",
    "config",
    "parquet",
    "torch_api",
    "masks",
    "bundle",
    "fast",
    "ops",
    "encoders",
    "linear",
    "conversion",
    "model",
    "memory",
    "loop",
    "engines",
    "cost",
    "arguments",
    "calls",
    "edits",
    "pipeline",
    "jobs",
    "quality",
    "server",
    "start",
    "batch",
    "apps",
    "__main__",
]
LARGEST_ROOM = 10  # modules, __init__ aside
LONGEST_MODULE = 350  # lines


def package_files() -> list[Path]:
    return sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def module_name(path: Path) -> str:
    """``loop.step`` for mogle_rt/loop/step.py, ``masks`` for mogle_rt/masks/__init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in package_files()}


def imports(source: str, *, package: str = "mogle_rt") -> set[str]:
    """Modules of the package that a source imports, also within functions. Their names begin behind the package's.

    What stands under ``if TYPE_CHECKING`` is left out. An imported class or function counts as its module.
    """
    tree = ast.parse(source)
    types_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in types_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    inside = {name.removeprefix(f"{package}.") for name in found if name.startswith(f"{package}.")}
    return {next((m for m in (name, name.rpartition(".")[0]) if m in MODULES), name) for name in inside}


def room(module: str) -> str:
    return module.partition(".")[0]


@functools.cache
def graph() -> dict[str, set[str]]:
    """The modules that each module imports."""
    return {name: imports(path.read_text()) & set(MODULES) for name, path in MODULES.items()}


def test_every_module_has_its_room() -> None:
    assert {room(name) for name in MODULES} == set(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_imports_go_one_way(name: str) -> None:
    below = set(ROOMS[: ROOMS.index(name)])
    for module in (m for m in MODULES if room(m) == name):
        for imported in graph()[module]:
            assert room(imported) in below or room(imported) == name, f"{module} imports {imported}"


@pytest.mark.parametrize(
    ("line", "module"),
    [
        ("import mogle_rt.loop.step", "loop.step"),
        ("from mogle_rt.loop import step", "loop.step"),
        ("from mogle_rt.loop.step import Step", "loop.step"),
        ("def f():\n    from mogle_rt import masks", "masks"),
    ],
)
def test_every_form_of_import_is_seen(line: str, module: str) -> None:
    assert imports(line) == {module}


def test_there_are_no_circles() -> None:
    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for imported in graph()[module] - {module}:
                visit(imported, (*path, module))
            done.add(module)

    done: set[str] = set()
    for module in MODULES:
        visit(module, ())


def test_rooms_are_small() -> None:
    """A folder within a room is counted by itself; its modules do not count in the outer room."""
    for folder in {path.parent for path in MODULES.values()} - {ROOT}:
        inside = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
        assert len(inside) <= LARGEST_ROOM, f"{folder.name} has {len(inside)} modules"


@pytest.mark.parametrize("folder", ["mogle_rt", "kernels", "export", "benchmarks"])
def test_modules_are_short_or_say_why(folder: str) -> None:
    for path in (ROOT.parent / folder).rglob("*.py"):
        first, *others = path.read_text().splitlines() or [""]
        reasoned = "long because" in first.lower()
        assert len(others) < LONGEST_MODULE or reasoned, f"{path.name} has {len(others) + 1} lines"


def test_the_wheel_holds_every_room() -> None:
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    folders = {f"mogle_rt.{p.parent.relative_to(ROOT).as_posix().replace('/', '.')}" for p in ROOT.rglob("*/*.py")}
    assert listed == folders | {
        "mogle_rt",
        "mogle_rt.kernels",
        "mogle_rt.export",
        "mogle_rt.data",
        "mogle_rt.data.examples",
        "mogle_rt.server.page",
    }


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_is_light() -> None:
    """Neither importing the package nor the command line's help imports torch."""
    assert run("import sys, mogle_rt, mogle_rt.apps.cli; print('torch' in sys.modules)") == "False"


def test_triton_and_the_extras_may_be_missing() -> None:
    """Everything that runs on PyTorch's operations can be imported without them, even the kernels' gate and experts.

    And `mogle_rt.convert` is still the function, although the module `convert` was imported.
    """
    missing = ("triton", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "gguf", "peft")
    modules = (
        "ops.torch_ops",
        "ops.choice",
        "model.loading",
        "loop.step",
        "conversion.convert",
        "pipeline",
        "apps.cli",
    )
    code = f"import sys; sys.modules |= dict.fromkeys({missing}); import mogle_rt; mogle_rt.Pipeline; "
    code += "; ".join(f"import mogle_rt.{module}" for module in modules)
    assert run(f"{code}; print(callable(mogle_rt.convert))") == "True"


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'pipeline_of'"):
        _ = mogle_rt.pipeline_of


def test_kernels_stand_alone() -> None:
    """Kernels know torch, triton and each other."""
    for path in (ROOT.parent / "kernels").glob("*.py"):
        assert not imports(path.read_text()) & set(MODULES), path.name


def test_quick_tests_are_of_every_room() -> None:
    """`make quick` has tests of every folder that has tests."""
    folders: dict[Path, bool] = {}
    for path in Path(__file__).parent.rglob("test_*.py"):
        folders[path.parent] = folders.get(path.parent, False) or "pytest.mark.quick" in path.read_text()
    assert len(folders) > 10
    assert [folder.name for folder, quick in folders.items() if not quick] == []
