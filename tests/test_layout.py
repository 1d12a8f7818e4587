"""The house rules that a test can keep: imports go one way, importing is light, the package is whole."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mogle_rt

ROOT = Path(mogle_rt.__file__).parent

# Each line may import only from lines above it (and, within a line, nothing of the same line unless listed).
LAYERS = [
    ["errors", "config"],
    ["cache", "schema", "storage", "devices", "gpus", "demo"],
    ["masks", "image_files", "sources", "checkpoint", "attention", "activation", "onednn", "channels_last"],
    ["models", "lora", "torch_ops", "triton_ops"],
    ["ops"],
    ["modulation", "mogle", "converter"],
    ["transformer", "conditioning", "text"],
    ["step", "arguments", "drawings"],
    ["loading", "packing", "sampling", "graphs"],
    ["engines", "manifest", "engine_file"],
    ["onnx_engine"],
    ["tensorrt_engine"],
    ["engine_choice"],
    ["pipeline"],
    ["counting", "job"],
    ["reference_cost"],
    ["cost"],
    ["cli"],
    ["__main__"],
]
WITHIN = {("config", "errors")}


def imports(path: Path) -> set[str]:
    """mogle_rt modules that a module imports, those inside functions included; types-only ones excluded."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped or not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("mogle_rt"):
            continue
        assert node.module
        names = [a.name for a in node.names] if node.module == "mogle_rt" else [node.module.split(".")[1]]
        found |= {n for n in names if (ROOT / f"{n}.py").exists()}
    return found


def test_every_module_has_its_layer() -> None:
    assert {p.stem for p in ROOT.glob("*.py")} - {"__init__"} == {name for layer in LAYERS for name in layer}


@pytest.mark.parametrize("number", range(len(LAYERS)))
def test_imports_go_one_way(number: int) -> None:
    above = {name for layer in LAYERS[:number] for name in layer}
    for name in LAYERS[number]:
        for imported in imports(ROOT / f"{name}.py"):
            assert imported in above or (name, imported) in WITHIN, f"{name} imports {imported}"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_is_light() -> None:
    """Neither the package nor the command line's help waits for torch."""
    assert run("import sys, mogle_rt, mogle_rt.cli; print('torch' in sys.modules)") == "False"


def test_convert_stays_a_function() -> None:
    assert run("import mogle_rt, mogle_rt.cli, mogle_rt.converter; print(callable(mogle_rt.convert))") == "True"


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'pipeline_of'"):
        _ = mogle_rt.pipeline_of


def test_kernels_stand_alone() -> None:
    """Kernels know torch, triton and each other."""
    for path in (ROOT.parent / "kernels").glob("*.py"):
        assert not imports(path), path.name
