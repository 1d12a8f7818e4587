"""The first seconds, each time in a process of its own: pages of text, a mistake, and the demo's first image.

The first image is also timed with the ordinary imports, which a user's own program has: the difference is what
`mogle_rt.start.quick_imports` saves.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

PROGRAM = (sys.executable, "-m", "mogle_rt")
ORDINARY = (
    "from mogle_rt.apps import cli; from mogle_rt.start import quick_imports; "
    "quick_imports.import_models = lambda: None; cli.main()"
)
IMAGE = ("generate", "demo", "-m", "examples/mask.png", "-p", "a young woman", "--seed", "1", "--overwrite")
ROOT = Path(__file__).parents[1]
ROUNDS = 3


def time_process(benchmark: BenchmarkFixture, command: tuple[str, ...], code: int = 0) -> None:
    """Wall time until the process has ended. A first run, which fills the system's file cache, doesn't count.

    The processor's seconds, which other work on the machine changes less, are noted beside it.
    """
    processor: list[float] = []

    def run() -> None:
        before = os.times()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        processor.append(used)

    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)  # type: ignore[no-untyped-call]
    benchmark.extra_info["processor_s"] = round(min(processor), 2)


@pytest.mark.parametrize("page", [("--help",), ("generate", "--help"), ("examples",), ("info", "demo")], ids=" ".join)
def test_pages(page: tuple[str, ...], benchmark: BenchmarkFixture) -> None:
    time_process(benchmark, (*PROGRAM, *page))


def test_mistyped_mask(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    time_process(benchmark, (*PROGRAM, "generate", "demo", "-m", str(tmp_path / "absent.png")), code=1)


@pytest.mark.parametrize("imports", ["quick", "ordinary"])
def test_first_image(imports: str, benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    program = PROGRAM if imports == "quick" else (sys.executable, "-c", ORDINARY)
    time_process(benchmark, (*program, *IMAGE, "-o", str(tmp_path / "face.png")))
