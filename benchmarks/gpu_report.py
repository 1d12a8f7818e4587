"""`make gpu`: the GPU tests and the kernels' timings on this machine's card, into gpu-report.md.

It installs nothing: it runs with the Python and the PyTorch that are there. The parts that matter most come first; when
the time is over, the report says what was left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEEDED = ("torch", "triton", "pytest", "numpy", "safetensors")
# Without these, the tests that use them can't be collected. The kernels' own tests and timings don't need them.
USEFUL = ("diffusers", "transformers", "tokenizers", "PIL", "psutil", "tqdm", "onnx", "onnxruntime", "tensorrt_rtx")
STAGES = (  # the most important first
    ("kernels against their twins", ("tests/kernels/test_gpu.py", "-k", "equals or nan or replays")),
    ("graphs, and the golden cases on the card", ("tests/loop/test_graphs.py",)),
    ("everything else", ("tests", "--ignore=tests/kernels/test_gpu.py", "--ignore=tests/loop/test_graphs.py")),
    ("kernels against separate operations", ("tests/kernels/test_gpu.py", "-k", "not (equals or nan or replays)")),
)
TIMINGS_SHARE = 0.25  # the part of the time that is kept for timings
GRACE = 15  # seconds that pytest gets to write its results after it was interrupted


def missing(names: Sequence[str]) -> list[str]:
    """Those of the named modules that this Python doesn't have."""
    return [name for name in names if importlib.util.find_spec(name) is None]


@dataclass
class Stage:
    """What came of a stage's tests.

    Attributes:
        counts: tests by outcome: passed, failed, error, skipped. failures: names and first lines of what went wrong.
        note: why the stage isn't whole, or "".
    """

    title: str
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    note: str = ""
    seconds: float = 0.0


def read_results(stage: Stage, path: Path) -> None:
    """Add the outcomes in pytest's JUnit file to a stage.

    The test that was running when pytest was stopped may have an entry too, without an outcome, which looks like one that
    passed: after a stop, a last test that "passed" is not counted.
    """
    cases = list(ET.parse(path).getroot().iter("testcase"))
    if stage.note and cases and len(cases[-1]) == 0:
        cases.pop()
    for case in cases:
        outcome = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed")
        stage.counts[{"failure": "failed"}.get(outcome, outcome)] += 1
        if outcome in ("failure", "error"):
            message = (case.find(outcome).get("message") or "").strip()  # type: ignore[union-attr]
            first = message.splitlines()[0] if message else outcome
            stage.failures.append(f"{case.get('classname')}::{case.get('name')}: {first[:200]}")


def run_stage(title: str, arguments: Sequence[str], seconds: float) -> Stage:
    """Run pytest for at most ``seconds``. The tests that have ended by then count."""
    stage, start = Stage(title), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors"]
        command += [f"--junitxml={results}", *arguments]
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            code = process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            stage.note = f"stopped after {seconds:.0f} s"
            os.killpg(process.pid, signal.SIGINT)  # pytest then writes what it has
            try:
                code = process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                code = process.wait()
        if results.exists():
            read_results(stage, results)
        elif not stage.note:
            stage.note = f"pytest ended with exit code {code} and no results"
        if code == 5:  # pytest's own: nothing was selected
            stage.note = "no tests of this kind"
    stage.seconds = time.monotonic() - start
    return stage


def timings(deadline: float) -> tuple[list[str], str]:
    """A row of Markdown for each kernel and dtype that there was time for, and a note on the rest."""
    import torch

    from benchmarks.kernel_timing import calls_beyond_cache, copy_rate, product_rate, seconds, separate_operations
    from mogle_rt.kernels.workloads import workloads

    copied, rows, left = copy_rate(), [], 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        product = product_rate(dtype)
        for work in workloads(dtype, "meta"):
            if time.monotonic() > deadline:
                left += 1
                continue
            cost = work.declared()
            least = max(cost.moved / copied, cost.flops / product)
            name = str(dtype).removeprefix("torch.")
            try:
                kernel = seconds(calls_beyond_cache(work.name, dtype))
                twin = seconds(calls_beyond_cache(work.name, dtype, separate_operations))
            except (RuntimeError, ValueError) as error:  # the row says why this kernel doesn't run; the others still do
                rows.append(f"| {work.name} | {name} | {str(error).splitlines()[0][:100]} | | | |")
                continue
            columns = f"{kernel * 1e6:.1f} | {least * 1e6:.1f} | {least / kernel:.0%} | {twin * 1e6:.1f}"
            rows.append(f"| {work.name} | {name} | {columns} |")
    return rows, f"{left} more had no time left" if left else ""


def report(card: str, stages: Sequence[Stage], rows: Sequence[str], notes: Sequence[str]) -> str:
    """The report in Markdown."""
    import torch

    # PyTorch's own version also names the CUDA that it was built for, which its wheel's metadata may leave out.
    versions = {"torch": str(torch.__version__)}
    versions |= {name: _version(name) for name in ("triton", "numpy", "diffusers", "transformers")}
    lines = ["# GPU report", "", f"- card: {card}", f"- Python {platform.python_version()} on {platform.platform()}"]
    lines += [f"- {name} {version}" for name, version in versions.items() if version]
    lines += [f"- {note}" for note in notes if note]
    lines += [
        "",
        "## Tests",
        "",
        "| tests | passed | failed | errors | skipped | seconds | |",
        "|---|---|---|---|---|---|---|",
    ]
    for s in stages:
        counts = " | ".join(str(s.counts[kind]) for kind in ("passed", "failed", "error", "skipped"))
        lines.append(f"| {s.title} | {counts} | {s.seconds:.0f} | {s.note} |")
    lines += ["", *(f"- {failure}" for s in stages for failure in s.failures), "", "## Kernels", ""]
    lines += [
        "Microseconds, of inputs larger than the card's cache. Least: what its own copies and products allow.",
        "",
    ]
    lines += ["| kernel | dtype | kernel | least | share | PyTorch |", "|---|---|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: all tests passed; 1: some failed; 2: the tests can't be run here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, default=ROOT / "gpu-report.md")
    parser.add_argument("--minutes", type=float, default=8.0, help="for tests and timings together")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    if absent := missing(NEEDED):
        print(
            f"make gpu needs {', '.join(absent)}; install that, or name another Python with PYTHON=…", file=sys.stderr
        )
        return 2
    import torch

    if not torch.cuda.is_available():
        print(f"no CUDA device: PyTorch {torch.__version__} of {sys.executable} sees none", file=sys.stderr)
        return 2
    index = torch.cuda.current_device()
    capability = "{}.{}".format(*torch.cuda.get_device_capability(index))
    memory = torch.cuda.get_device_properties(index).total_memory / 2**30
    card = f"{torch.cuda.get_device_name(index)}, compute capability {capability}, {memory:.0f} GiB"
    absent = missing(USEFUL)
    notes = [f"missing, so the tests that use them don't run: {', '.join(absent)}" if absent else ""]
    print(card, *filter(None, notes), sep="\n")
    end = start + 60 * options.minutes
    testing = end - 60 * options.minutes * TIMINGS_SHARE
    stages = [run_stage(*STAGES[0], testing - time.monotonic())]
    try:
        rows, note = timings(time.monotonic() + 60 * options.minutes * TIMINGS_SHARE)
        notes.append(note)
    except Exception as error:  # the report says why there are no timings
        rows = []
        notes.append(f"no timings: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    for title, tests in STAGES[1:]:
        left = end - time.monotonic() - GRACE
        stages.append(run_stage(title, tests, left) if left > 5 else Stage(title, note="no time left"))
        options.report.write_text(report(card, stages, rows, notes))
    print(f"written to {options.report}")
    return int(any(s.counts["failed"] + s.counts["error"] for s in stages) or not stages[0].counts["passed"])


if __name__ == "__main__":
    sys.exit(main())
