"""The table of a calibration: what each way costs and gains, beside fewer steps; and the picture sheet."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mogle_rt.fast.settings import FastConfig
from mogle_rt.jobs.sheet import write_grid
from mogle_rt.masks.labels import colorize, resize, to_labels
from mogle_rt.quality.calibration.cases import Case
from mogle_rt.quality.calibration.choosing import Bounds, Figures, choose, within
from mogle_rt.quality.calibration.results import Drawn, Results
from mogle_rt.quality.calibration.ways import EXACT, fewer_steps, label, price

MOST_ROWS = 12  # of the sheet
HEADINGS = (
    "way",
    "steps",
    "seconds",
    "PSNR",
    "worst",
    "SSIM",
    "latents",
    "mask",
    "fewer steps",
    "taken for",
)


def figures_of(results: Results, cases: Sequence[Case], ways: Sequence[FastConfig]) -> list[Figures]:
    """What was measured of the exact images and of each way, over all cases. Every image must be there.

    What costs most stands first, and fewer steps before the ways that cost as much.
    """
    exact = [results.of(case, EXACT) for case in cases]
    first, *others = [_figures(way, [results.of(case, way) for case in cases], exact) for way in (EXACT, *ways)]
    return [first, *sorted(others, key=lambda one: (-max(1, round(one.price)), not one.fewer_steps))]


def competitors_left(figures: Sequence[Figures], steps: int) -> list[FastConfig]:
    """Fewer steps at the price that ways turned out to have, as far as they were not drawn."""
    found = dict.fromkeys(fewer_steps(one.way, one.price, steps) for one in figures)
    return [way for way in found if way is not None and way not in {one.way for one in figures}]


def _figures(way: FastConfig, drawn: Sequence[Drawn], exact: Sequence[Drawn]) -> Figures:
    def mean(values: Sequence[float | None]) -> float | None:
        there = [value for value in values if value is not None]
        return statistics.fmean(there) if there else None

    mask, before = mean([one.mask for one in drawn]), mean([one.mask for one in exact])
    return Figures(
        way=way,
        computed=statistics.fmean(one.computed for one in drawn),
        price=statistics.fmean(price(one.computed, one.condition) for one in drawn),
        seconds=statistics.median(one.seconds / one.beside for one in drawn)
        * statistics.median(e.seconds for e in exact),
        psnr=statistics.fmean(one.psnr for one in drawn),
        worst=min(one.psnr for one in drawn),
        ssim=mean([one.ssim for one in drawn]),
        latents=statistics.fmean(one.latents for one in drawn),
        mask=mask,
        mask_loss=None if mask is None or before is None else before - mask,
    )


class Table:
    """What is shown and stored.

    Args:
        figures: of the exact images and of every way.
        bounds: by the names of the modes. steps: that runs were asked for with.
        about: the model, the device and the like, by what they are called.
    """

    def __init__(
        self, figures: Sequence[Figures], bounds: Mapping[str, Bounds], steps: int, about: Mapping[str, Any]
    ) -> None:
        self.figures, self.bounds, self.steps, self.about = list(figures), dict(bounds), steps, dict(about)
        self.chosen = {name: choose(figures, one) or figures[0] for name, one in bounds.items()}
        self._by_way = {one.way: one for one in figures}

    @property
    def settings(self) -> dict[str, FastConfig]:
        """The settings that are stored, by name."""
        return {name: figures.way for name, figures in self.chosen.items()}

    def competitor(self, figures: Figures) -> Figures | None:
        """Fewer steps at the price of a way, if they were drawn."""
        other = fewer_steps(figures.way, figures.price, self.steps)
        return None if other is None else self._by_way.get(other)

    def rows(self) -> list[tuple[str, ...]]:
        """The cells below `HEADINGS`."""
        return [self._row(one) for one in self.figures]

    def _row(self, one: Figures) -> tuple[str, ...]:
        other = self.competitor(one)
        beaten = other is not None and other.psnr >= one.psnr
        return (
            label(one.way),
            f"{one.computed:.1f}".removesuffix(".0"),
            f"{one.seconds:.2f}",
            "" if one.way.exact else f"{one.psnr:.1f}",
            "" if one.way.exact else f"{one.worst:.1f}",
            "" if one.ssim is None else f"{one.ssim:.4f}",
            "" if one.way.exact else f"{one.latents:.4f}",
            "" if one.mask is None else f"{one.mask:.3f}",
            "" if other is None else f"{label(other.way)}: {other.psnr:.1f}{', better' * beaten}",
            ", ".join(name for name, figures in self.chosen.items() if figures is one),
        )

    def sentences(self) -> list[str]:
        """What was taken and why, for people; a line each."""
        lines = []
        exact = self.figures[0]
        for name, one in self.chosen.items():
            bound = str(self.bounds[name]) or "no bounds"
            if one.way.exact:
                lines.append(f"{name} ({bound}): nothing is left out, as no faster way stays within the bounds")
                continue
            faster = exact.seconds / one.seconds if one.seconds else math.inf
            what = f"{label(one.way)}, an exact run of a shorter schedule" if one.fewer_steps else label(one.way)
            lines.append(
                f"{name} ({bound}): {what}: {faster:.2f} times as fast, {one.psnr:.1f} dB, worst {one.worst:.1f}"
            )
        rivals = [(one, other) for one in self.figures if (other := self.competitor(one)) is not None]
        lost = sum(other.psnr >= one.psnr for one, other in rivals)
        if rivals:
            lines.append(f"fewer steps are as good or better than {lost} of {len(rivals)} ways at the same price")
        return lines

    def markdown(self) -> str:
        """The table as Markdown, with the sentences below it."""
        cells = [HEADINGS, ("---", *["--:"] * 7, "---", "---"), *self.rows()]
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        about = ", ".join(f"{name} {value}" for name, value in self.about.items())
        return "\n".join([f"{about}\n", *lines, "", *(f"- {line}" for line in self.sentences())]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """All figures, as JSON has them."""
        return {
            "about": self.about,
            "ways": [
                one.to_dict()
                | {"name": label(one.way), "within": [n for n, b in self.bounds.items() if within(one, b)]}
                for one in self.figures
            ],
            "bounds": {name: bounds.to_dict() for name, bounds in self.bounds.items()},
            "chosen": {name: config.to_dict() for name, config in self.settings.items()},
        }


def write_sheet(path: Path, results: Results, cases: Sequence[Case], ways: Sequence[FastConfig], order: Any) -> None:
    """Write the picture sheet: a row for each case, with its mask, the exact image, and that of each way beside it.

    Where there are many cases, it shows those that changed most.
    """

    def change(case: Case) -> float:
        return min((results.of(case, way).psnr for way in ways), default=0.0)

    shown = sorted(cases, key=change)[:MOST_ROWS]
    rows = []
    for case in (case for case in cases if case in shown):
        row: list[tuple[Image.Image, str]] = []
        for way in (EXACT, *ways):
            with Image.open(results.image_path(case, way)) as image:
                name = (
                    label(way).removeprefix("steps_mask=").replace("refresh_every=", "refresh ")
                )  # it has little room
                text = "exact" if way.exact else f"{name}: {results.of(case, way).psnr:.1f} dB"
                row.append((image.convert("RGB"), text))
        width, height = row[0][0].size
        mask = Image.new("RGB", (width, height), "white")
        if case.mask is not None:
            mask = Image.fromarray(colorize(resize(to_labels(case.mask, order=order), height, width)))
        rows.append([(mask, case.name), *row])
    write_grid(path, rows)
