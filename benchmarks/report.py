"""Measured rows as a table on the terminal, as benchmarks/RESULTS.md and as a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ORDER = ("experts and gate", "step", "image", "engines", "mask", "load", "peak memory")  # of groups
NOISY = 0.15  # spread, or others' share of the processors, above which a figure is marked
HEADINGS = (
    "",
    "engine",
    "baseline",
    "ratio",
    "of the fastest",
    "limit",
    "largest ratio",
    "engine / limit",
    "spread",
    "others",
    "between cores",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison.

    Attributes:
        group, name: what was measured.
        engine, baseline: medians, in ``unit``.
        limit: the least that this machine can do it in, None where no limit is known. ``bound``: what sets it.
        fastest_ratio: ratio of the fastest rounds, which a busy machine disturbs less than medians; 0 if unknown.
        spread: half the distance of the quartiles over the median, the larger of both sides'.
        others: share of the processors that other programs took meanwhile.
        core: what the engine's own products take of its time, None where they weren't timed.
        transfers: bytes a second from one processor to another meanwhile, None if unknown; see `benchmarks.cores`.
    """

    group: str
    name: str
    engine: float
    baseline: float
    unit: str = "ms"
    limit: float | None = None
    bound: str = ""
    fastest_ratio: float = 0.0
    spread: float = 0.0
    others: float = 0.0
    core: float | None = None
    transfers: float | None = None

    @property
    def ratio(self) -> float:
        """How many times better the engine is."""
        return self.baseline / self.engine

    @property
    def largest_ratio(self) -> float | None:
        """The ratio of an engine that reaches the limit."""
        return None if self.limit is None else self.baseline / self.limit

    @property
    def title(self) -> str:
        return f"{self.group}: {self.name}"

    @property
    def noisy(self) -> bool:
        return max(self.spread, self.others) > NOISY

    def cells(self) -> tuple[str, ...]:
        """As `HEADINGS`."""
        limit = "-" if self.limit is None else f"{_number(self.limit)} {self.unit} ({self.bound})"
        return (
            self.title,
            f"{_number(self.engine)} {self.unit}",
            f"{_number(self.baseline)} {self.unit}",
            f"{_number(self.ratio)}x",
            f"{_number(self.fastest_ratio)}x" if self.fastest_ratio else "-",
            limit,
            "-" if self.largest_ratio is None else f"{_number(self.largest_ratio)}x",
            "-" if self.limit is None else _number(self.engine / self.limit),
            f"{self.spread:.0%}{' noisy' if self.noisy else ''}" if self.spread else "-",
            f"{self.others:.0%}",
            "-" if self.transfers is None else f"{self.transfers / 1e9:.0f} GB/s",
        )


def _number(value: float) -> str:
    """Three digits."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Group by group."""
    return sorted(rows, key=lambda row: ORDER.index(row.group))


def table(rows: Sequence[Row]) -> list[str]:
    """Aligned lines; they are a table in Markdown too."""
    lines = [HEADINGS, *(row.cells() for row in ordered(rows))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = cells
        aligned = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(lines[0]), line(rule), *(line(cells) for cells in lines[1:])]


# A step of the reference's own code, batch 1, float32, on another 2-core CPU: ms, by the name of the row.
REFERENCE_STEP = {
    "tiny, 64 px": 19.8,
    "width 256, 128 px": 69.0,
    "width 256, 256 px": 141.0,
    "FLUX width, 512 px": 17700.0,
}


def honesty(rows: Sequence[Row]) -> list[str]:
    """The baseline's steps beside the reference's own: on a fair baseline the last column is about one number."""
    steps = {row.name: row for row in rows if row.group == "step"}
    lines = [
        f"| {name} | {_number(steps[f'{name}, batch 1'].baseline)} ms | {_number(theirs)} ms "
        f"| {_number(theirs / steps[f'{name}, batch 1'].baseline)} |"
        for name, theirs in REFERENCE_STEP.items()
        if f"{name}, batch 1" in steps
    ]
    if not lines:
        return []
    heading = [
        "| a step | the baseline, here | the reference's code, on another CPU | ratio |",
        "| --- | --: | --: | --: |",
    ]
    return ["", "Is the baseline fair?", "", *heading, *lines]


def cores(rows: Sequence[Row]) -> list[str]:
    """How near the engine is to its own products."""
    lines = [
        f"| {row.title} | {_number(row.engine)} ms | {_number(row.core)} ms | {_number(row.engine / row.core)} "
        f"| {_number(row.ratio)}x | {_number(row.baseline / row.core)}x |"
        for row in ordered(rows)
        if row.core
    ]
    if not lines:
        return []
    heading = [
        "| | engine | of it products and attention | engine / these | ratio | ratio if there were nothing else |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    text = "What the engine's own matrix products and attention take of its time:"
    return ["", text, "", *heading, *lines]


EXPLANATION = """\
Made by `make bench`, with the mask told below. Both sides load the same files, give the same result (checked before
anything is timed, to {tolerance:g} relative RMS), and are timed in turns in one process; the figures are medians. The
baseline ([baseline.py](baseline.py)) computes as the reference does, on diffusers' and peft's modules; it has no batches
and makes its images one after the other. In the rows *engines*, the engine is onnxruntime and the baseline is this runtime's
torch engine; a ratio below 1 means that onnxruntime is slower.

**limit**: the least time for the same work on this machine: the FLOPs that are needed over the rate of a plain matrix
product measured alongside (in steps and images, the model's own largest), or the bytes that must be read and written
over the rate of copies, whichever is more. **largest ratio**: what an engine at that limit would reach. **of the
fastest**: the ratio of either side's fastest round, which a busy machine disturbs less. **spread**: half the distance
of the quartiles over the median, of the noisier side. **others**: what other programs took of the processors' time
meanwhile. **between cores**: how fast one processor gets what another has just written, in no order. Where it is slow,
they share no cache, and everything that is done on both takes longer, the baseline more than the engine; a virtual
machine's host may change it at any moment.
"""


def write(path: Path, rows: Sequence[Row], machine: Mapping[str, str], tolerance: float) -> list[Path]:
    """Write the report and, beside it, the plot. Returns both paths."""
    plot = path.with_name("results.png")
    text = [
        "# Benchmarks",
        "",
        EXPLANATION.format(tolerance=tolerance),
        *(f"- {name}: {value}" for name, value in machine.items()),
        "",
        *table(rows),
        *cores(rows),
        *honesty(rows),
        "",
        f"![How many times faster than the baseline, and how far it could be]({plot.name})",
        "",
    ]
    path.write_text("\n".join(text), encoding="utf-8")
    draw(plot, ordered(rows), machine)
    return [path, plot]


def draw(path: Path, rows: Sequence[Row], machine: Mapping[str, str]) -> None:
    """Bars of the ratios, with marks where the limits are."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    groups = list(dict.fromkeys(row.group for row in rows))
    places = range(len(rows))
    axes.barh(places, [row.ratio for row in rows], color=[f"C{groups.index(row.group)}" for row in rows])
    limits = [(i, row.largest_ratio) for i, row in enumerate(rows) if row.largest_ratio is not None]
    axes.plot(
        [x for _, x in limits], [i for i, _ in limits], "|", color="black", markersize=14, label="limit of the machine"
    )
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(places, [f"{row.title}   {_number(row.ratio)}x" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.05, y=0.01)
    axes.set_xlabel("baseline / engine")
    axes.set_title(f"{machine.get('GPU', machine['CPU'])}, {machine['computed in']}", fontsize=9)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)
