"""Shows what was measured: as a table on the terminal, as benchmarks/RESULTS.md, and as a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ORDER = ("experts and gate", "step", "image", "engines", "mask", "load", "data set", "peak memory")  # of groups
NOISY = 0.15  # a figure is marked where its spread, or the processor time of other programs, is above this share
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
        engine, baseline: the medians of the two sides, in ``unit``.
        limit: the least that is possible on this machine, or None if no limit is known. ``bound``: what sets the limit.
        fastest_ratio: the ratio of the fastest rounds, which a busy machine disturbs less than medians; 0 if unknown.
        spread: half the distance between the quartiles, divided by the median; the larger of the two sides.
        others: the share of the processors' time that other programs took meanwhile.
        core: the time of the engine's own products and attention, or None if they were not timed.
        transfers: bytes a second from one processor to another meanwhile, or None if unknown; see `benchmarks.cores`.
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
        """The row's texts, in the order of `HEADINGS`."""
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


@dataclass(frozen=True, kw_only=True)
class Wait:
    """How long a command of the program takes, from its start in a new process to its end.

    Attributes:
        command: as it is typed.
        seconds: wall time, the median.
        processor: seconds of processor time, the least: other programs change it less than the wall time.
        others: the share of the processors' time that other programs took meanwhile.
    """

    command: str
    seconds: float
    processor: float
    others: float


@dataclass(frozen=True, kw_only=True)
class LargeStep:
    """A step of the full-size model in little memory.

    Attributes:
        name: the model, its dtype and the image's size.
        seconds: of the step, with reading its weights from the file. products: of its matrix products alone, on weights
            in memory.
        allowed, peak: bytes that the process may take, and the most that it took.
        streamed, sublayers: how many sublayers' weights were streamed, and how many there are.
        others: the share of the processors' time that other programs took meanwhile.
    """

    name: str
    seconds: float
    products: float
    allowed: float
    peak: float
    streamed: int
    sublayers: int
    others: float


def _number(value: float) -> str:
    """A number with three digits."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def ordered(rows: Sequence[Row]) -> list[Row]:
    """The rows, sorted by their groups."""
    return sorted(rows, key=lambda row: ORDER.index(row.group))


def table(rows: Sequence[Row]) -> list[str]:
    """The table as aligned lines, which Markdown reads as a table too."""
    lines = [HEADINGS, *(row.cells() for row in ordered(rows))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = cells
        aligned = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(lines[0]), line(rule), *(line(cells) for cells in lines[1:])]


# Milliseconds of a step of the reference's own code (batch 1, float32, another 2-core CPU), by the name of the row.
REFERENCE_STEP = {
    "tiny, 64 px": 19.8,
    "width 256, 128 px": 69.0,
    "width 256, 256 px": 141.0,
    "FLUX width, 512 px": 17700.0,
}


def honesty(rows: Sequence[Row]) -> list[str]:
    """The baseline's steps beside the reference's own: if it is fair, the last column is about the same in all rows."""
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
    """How near the engine's time is to that of its own products and attention."""
    lines = [
        f"| {row.title} | {_number(row.engine)} ms | {_number(row.core)} ms | {_number(row.engine / row.core)} "
        f"| {_number(row.ratio)}x | {_number(row.baseline / row.core)}x |"
        for row in ordered(rows)
        if row.core
    ]
    if not lines:
        return []
    heading = [
        "| | engine | its products and attention | engine / these | ratio | ratio if there were nothing else |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    text = "How much of the engine's time its own matrix products and attention take:"
    return ["", text, "", *heading, *lines]


def waits(rows: Sequence[Wait]) -> list[str]:
    """The table of the first seconds."""
    if not rows:
        return []
    text = "The first seconds: a command in a new process, from its start to its end, with all files in the system's cache."
    heading = ["| command | wall time | processor time | others |", "| --- | --: | --: | --: |"]
    lines = [
        f"| {row.command} | {_number(row.seconds)} s | {_number(row.processor)} s "
        f"| {row.others:.0%}{' noisy' if row.others > NOISY else ''} |"
        for row in rows
    ]
    return ["", text, "", *heading, *lines]


def large_steps(rows: Sequence[LargeStep]) -> list[str]:
    """The table of steps in little memory."""
    if not rows:
        return []
    text = "A step of the full-size model in little memory, whose weights are read from the file while it computes:"
    heading = [
        "| a step | memory allowed | memory at the peak | sublayers streamed | time | its products alone | ratio | others |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    lines = [
        f"| {row.name} | {row.allowed / 1e9:.1f} GB | {row.peak / 1e9:.1f} GB | {row.streamed} of {row.sublayers} "
        f"| {_number(row.seconds)} s | {_number(row.products)} s | {_number(row.seconds / row.products)} "
        f"| {row.others:.0%}{' noisy' if row.others > NOISY else ''} |"
        for row in rows
    ]
    return ["", text, "", *heading, *lines]


EXPLANATION = """\
`make bench` writes this page, and the list below says which mask was used. Both sides load the same files. Before
anything is timed it is checked that they give the same result, to {tolerance:g} relative RMS. Then they are timed in turns,
in one process; the figures are medians. The baseline ([baseline.py](baseline.py)) computes as the reference does, on
diffusers' and peft's modules. It has no batches, so it makes its images one after the other. In the rows *engines*, the
engine is onnxruntime and the baseline is this runtime's torch engine; a ratio below 1 means that onnxruntime is slower.

- **limit**: the least time in which this machine could do the same work. It is either the FLOPs that are needed, divided
  by the rate of a plain matrix product that is measured alongside (in steps and images, the largest product of the
  model), or the bytes that must be read and written, divided by the rate of copies, whichever takes longer.
- **largest ratio**: the ratio of an engine that reaches this limit.
- **of the fastest**: the ratio of the fastest rounds of the two sides, which a busy machine disturbs less.
- **spread**: half the distance between the quartiles, divided by the median, of the side that varies more.
- **others**: the share of the processors' time that other programs took meanwhile.
- **between cores**: how fast one processor reads, in random order, what another one has just written. Where this is slow
  the two share no cache, and all work on both takes longer, the baseline's more than the engine's. In a virtual machine
  the host may change this at any moment.
"""


def write(
    path: Path,
    rows: Sequence[Row],
    machine: Mapping[str, str],
    tolerance: float,
    first: Sequence[Wait] = (),
    large: Sequence[LargeStep] = (),
) -> list[Path]:
    """Write the report, and the plot beside it. Returns both paths."""
    plot = path.with_name("results.png")
    text = [
        "# Benchmarks",
        "",
        EXPLANATION.format(tolerance=tolerance),
        *(f"- {name}: {value}" for name, value in machine.items()),
        "",
        *table(rows),
        *cores(rows),
        *waits(first),
        *large_steps(large),
        *honesty(rows),
        "",
        f"![How many times faster than the baseline, and how far it could be]({plot.name})",
        "",
    ]
    path.write_text("\n".join(text), encoding="utf-8")
    draw(plot, ordered(rows), machine)
    return [path, plot]


def draw(path: Path, rows: Sequence[Row], machine: Mapping[str, str]) -> None:
    """Draw the ratios as bars, with marks at the limits."""
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
