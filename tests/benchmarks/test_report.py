"""The page of results holds every figure that was measured."""

from __future__ import annotations

from pathlib import Path

from benchmarks import report
from benchmarks.report import LargeStep, Row, Wait


def test_first_seconds_are_on_the_page(tmp_path: Path) -> None:
    row = Row(group="step", name="tiny, 64 px, batch 1", engine=1.3, baseline=9.6)
    first = [
        Wait(command="`mogle-rt --help`", seconds=0.512, processor=0.498, others=0.01),
        Wait(command="`mogle-rt generate demo`, one image", seconds=4.5, processor=3.9, others=0.4),
    ]
    page, plot = report.write(tmp_path / "RESULTS.md", [row], {"CPU": "a CPU", "computed in": "float32"}, 1e-5, first)
    text = page.read_text(encoding="utf-8")
    assert plot.exists()
    assert "| `mogle-rt --help` | 0.512 s | 0.498 s | 1% |\n" in text
    assert "| `mogle-rt generate demo`, one image | 4.50 s | 3.90 s | 40% noisy |\n" in text
    assert text.index("The first seconds") > text.index("step: tiny")
    assert "The first seconds" not in report.write(tmp_path / "RESULTS.md", [row], {"CPU": "", "computed in": ""}, 1)[
        0
    ].read_text(encoding="utf-8")


def test_a_step_in_little_memory_is_on_the_page(tmp_path: Path) -> None:
    row = Row(group="step", name="tiny, 64 px, batch 1", engine=1.3, baseline=9.6)
    large = LargeStep(
        name="FLUX.1-dev, float32 from a bfloat16 file, 512 px",
        seconds=210.4,
        products=200.0,
        allowed=6e9,
        peak=5.04e9,
        streamed=72,
        sublayers=76,
        others=0.02,
    )
    machine = {"CPU": "a CPU", "computed in": "float32"}
    page, _ = report.write(tmp_path / "RESULTS.md", [row], machine, 1e-5, large=[large])
    assert (
        "| FLUX.1-dev, float32 from a bfloat16 file, 512 px | 6.0 GB | 5.0 GB | 72 of 76 | 210 s | 200 s | 1.05 | 2% |\n"
    ) in page.read_text(encoding="utf-8")
    page, _ = report.write(tmp_path / "RESULTS.md", [row], machine, 1e-5)
    assert "little memory" not in page.read_text(encoding="utf-8")
