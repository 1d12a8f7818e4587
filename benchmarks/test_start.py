"""The first seconds, each time in a process of its own: pages of text, a mistake, and the demo's first image.

The first image is also timed with the ordinary imports, which a user's own program has: the difference is what
`mogle_rt.start.quick_imports` saves.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.report import Wait
from benchmarks.side_by_side import Neighbours

PROGRAM = (sys.executable, "-m", "mogle_rt")
ORDINARY = (
    "from mogle_rt.apps import cli; from mogle_rt.start import quick_imports; "
    "quick_imports.import_models = lambda: None; cli.main()"
)
IMAGE = ("generate", "demo", "-m", "examples/mask.png", "-p", "a young woman", "--seed", "1", "--overwrite")
ROOT = Path(__file__).parents[1]
ROUNDS = 3


def time_process(
    benchmark: BenchmarkFixture, waits: list[Wait], title: str, command: tuple[str, ...], code: int = 0
) -> None:
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

    run()
    processor.clear()
    with Neighbours() as neighbours:
        benchmark.pedantic(run, rounds=ROUNDS)  # type: ignore[no-untyped-call]
    benchmark.extra_info["processor_s"] = round(min(processor), 2)
    assert benchmark.stats is not None
    seconds = statistics.median(benchmark.stats.stats.data)
    waits.append(Wait(command=title, seconds=seconds, processor=min(processor), others=neighbours.share))


PAGES = (("--help",), ("generate", "--help"), ("examples",), ("info", "demo"), ("cost", "--flux-dev", "--json"))


@pytest.mark.parametrize("page", PAGES, ids=" ".join)
def test_pages(page: tuple[str, ...], benchmark: BenchmarkFixture, waits: list[Wait]) -> None:
    time_process(benchmark, waits, f"`mogle-rt {' '.join(page)}`", (*PROGRAM, *page))


def test_mistyped_mask(benchmark: BenchmarkFixture, waits: list[Wait], tmp_path: Path) -> None:
    command = (*PROGRAM, "generate", "demo", "-m", str(tmp_path / "absent.png"))
    time_process(benchmark, waits, "`mogle-rt generate` with a mask that isn't there", command, code=1)


def test_mistyped_folder(benchmark: BenchmarkFixture, waits: list[Wait], tmp_path: Path) -> None:
    files = ("--lora", str(tmp_path), "--mogle", str(tmp_path), "-o", str(tmp_path / "b.safetensors"))
    command = (*PROGRAM, "convert", "--flux", str(tmp_path / "absent"), *files)
    time_process(benchmark, waits, "`mogle-rt convert` with a folder that isn't there", command, code=1)


@pytest.mark.parametrize("imports", ["quick", "ordinary"])
def test_first_image(imports: str, benchmark: BenchmarkFixture, waits: list[Wait], tmp_path: Path) -> None:
    program = PROGRAM if imports == "quick" else (sys.executable, "-c", ORDINARY)
    title = "`mogle-rt generate demo`, one image" + (" with ordinary imports" if imports == "ordinary" else "")
    time_process(benchmark, waits, title, (*program, *IMAGE, "-o", str(tmp_path / "face.png")))
