"""`pytest benchmarks/ --benchmark-only`: its options, its fixtures, and the table that it prints at the end.

``--results PATH`` writes the table with the machine, the versions and the date, and a plot beside it.
pytest-benchmark's own option ``--benchmark-json PATH`` writes JSON.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import report
from benchmarks.machine import Machine
from benchmarks.report import LargeStep, Row, Wait
from benchmarks.side_by_side import TOLERANCES, SideBySide
from benchmarks.sizes import Models, face_mask
from mogle_rt.config import parse_dtype
from mogle_rt.masks import Labels, to_labels

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no benchmark may use the network

ROWS = pytest.StashKey[list[Row]]()
WAITS = pytest.StashKey[list[Wait]]()
LARGE_STEPS = pytest.StashKey[list[LargeStep]]()
MACHINE = pytest.StashKey[Machine]()
ModelsOf = Callable[[str], Models]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mogle_rt benchmarks")
    group.addoption("--results", type=Path, help="write the table to this Markdown file, and results.png beside it")
    group.addoption("--device", help="cpu or cuda; by default a CUDA GPU if there is one")
    group.addoption("--dtype", default="fp32", help="fp32 (the default), bf16 or fp16")
    group.addoption("--patience", type=float, default=0, help="seconds to wait for a quiet machine, each time")
    group.addoption("--mask", help="the mask that conditions, a file; by default a drawn face of 12 classes")
    group.addoption(
        "--long", action="store_true", help="also what takes minutes a round: batches and images of FLUX width"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[WAITS] = []
    config.stash[LARGE_STEPS] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what was not asked for: timing takes minutes, so it needs --benchmark-only, and some of it --long."""
    for item in items:
        if not item.path.is_relative_to(Path(__file__).parent):
            continue
        item.add_marker(pytest.mark.timeout(3600))
        if not config.getoption("benchmark_only"):
            item.add_marker(pytest.mark.skip(reason="needs --benchmark-only"))
        elif item.get_closest_marker("slow") and not config.getoption("long"):
            item.add_marker(pytest.mark.skip(reason="needs --long"))


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> Machine:
    """The device, and its limits as they are measured at the start of this run."""
    name = request.config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    # float32 means float32: cuDNN would otherwise round a convolution's inputs to TF32.
    torch.backends.cudnn.allow_tf32 = False
    measured = Machine(torch.device(name), parse_dtype(request.config.getoption("dtype")))
    request.config.stash[MACHINE] = measured
    return measured


@pytest.fixture(autouse=True)
def _clock(request: pytest.FixtureRequest) -> None:
    """Give pytest-benchmark the machine's clock, which on a GPU reads CUDA events."""
    clock = request.getfixturevalue("machine").clock
    request.node.add_marker(pytest.mark.benchmark(timer=clock))


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def models(machine: Machine) -> Iterator[ModelsOf]:
    """Both sides of a size, from checkpoints that are written on first use and deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="mogle-rt-bench-") as folder:
        made: dict[str, Models] = {}

        def get(name: str) -> Models:
            if name not in made:
                made[name] = Models(name, Path(folder) / name.replace(" ", "-"), machine.device, machine.dtype)
            return made[name]

        yield get


@pytest.fixture(scope="session")
def mask(request: pytest.FixtureRequest) -> Labels:
    """The mask that all benchmarks use. Its size does not matter, as it is resized."""
    path = request.config.getoption("mask")
    return to_labels(path) if path else face_mask()


@pytest.fixture
def compare(request: pytest.FixtureRequest, _clock: None, machine: Machine, benchmark: BenchmarkFixture) -> SideBySide:
    """What a benchmark calls to time the engine beside the baseline."""
    config = request.config
    return SideBySide(benchmark, machine, config.stash[ROWS], config.getoption("patience"))


@pytest.fixture
def waits(request: pytest.FixtureRequest) -> list[Wait]:
    """The list to which a benchmark of the first seconds adds its figures."""
    return request.config.stash[WAITS]


@pytest.fixture
def large_steps(request: pytest.FixtureRequest) -> list[LargeStep]:
    """The list to which a benchmark of a step in little memory adds its figures."""
    return request.config.stash[LARGE_STEPS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table of ratios, and write the files that were asked for."""
    rows, waited, machine = config.stash[ROWS], config.stash[WAITS], config.stash.get(MACHINE, None)
    large = config.stash[LARGE_STEPS]
    for line in (*report.waits(waited), *report.large_steps(large)):
        terminalreporter.write_line(line)
    if not rows or machine is None:
        return
    mask = config.getoption("mask")
    facts = machine.describe() | {"mask": Path(mask).name if mask else "a drawn face of 12 classes"}
    terminalreporter.section("engine beside baseline")
    for name, value in facts.items():
        terminalreporter.write_line(f"{name}: {value}")
    for line in report.table(rows):
        terminalreporter.write_line(line)
    path: Path | None = config.getoption("results")
    if path is None:
        return
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"{path} was not written: a benchmark failed", red=True)
        return
    for written in report.write(path, rows, facts, TOLERANCES[machine.dtype], waited, large):
        terminalreporter.write_line(f"written: {written}")
