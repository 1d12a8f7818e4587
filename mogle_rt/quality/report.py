"""What an evaluation found: figures, each image's own values, and what could not be measured; as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mogle_rt import __version__
from mogle_rt.bundle.files import atomic_write
from mogle_rt.quality.bootstrap import Figure
from mogle_rt.quality.judges.contract import Parser
from mogle_rt.quality.rows import Row

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Kind:
    """What a figure means.

    Attributes:
        metric: the metric that it belongs to.
        title: for a table. unit: what follows the number; "%" shows shares in percent.
        higher: whether more is better; None where neither is.
        digits: after the point.
    """

    metric: str
    title: str
    higher: bool | None
    unit: str = ""
    digits: int = 3


KINDS = {
    "fid": Kind("fid", "FID", False),
    "kid": Kind("kid", "KID", False, digits=5),
    "cmmd": Kind("cmmd", "CMMD", False),
    "clip": Kind("clip", "CLIP text score", True, digits=2),
    "reward": Kind("reward", "ImageReward", True),
    "miou": Kind("mask", "mask, mIoU", True),
    "accuracy": Kind("mask", "mask, pixels", True, "%", 1),
    "identity": Kind("identity", "identity, cosine", True),
    "diversity": Kind("diversity", "diversity, features", None),
    "pixels": Kind("diversity", "diversity, pixels of 255", None, digits=1),
    "faces": Kind("faces", "faces", True, "%", 1),
    "colours": Kind("colours", "colours of the prompt", True, "%", 1),
}
METRICS = tuple(dict.fromkeys(kind.metric for kind in KINDS.values()))
AGAINST = ("fid", "kid", "cmmd", "identity")  # need real images


@dataclass(frozen=True)
class Measured:
    """A figure and the judge that it is by."""

    figure: Figure
    judge: str


@dataclass
class Report:
    """The result of `evaluate`.

    Attributes:
        folder: of the images. rows: what was judged.
        figures: by the names in `KINDS`.
        values: each row's own, by the names in `KINDS`; NaN where there is none.
        classes: the IoU of each class that occurs in masks, over all images, by its name.
        colours: for each attribute of the demo's prompts, how many colours are right, and of how many.
        skipped: why a metric was not measured, by its name.
        notes: what a reader of the figures should know.
        settings: what was asked for.
        parser: that found the regions, for pictures of them; None if none was needed.
    """

    folder: Path
    rows: Sequence[Row]
    figures: dict[str, Measured] = field(default_factory=dict)
    values: dict[str, Values] = field(default_factory=dict)
    classes: dict[str, float] = field(default_factory=dict)
    colours: dict[str, tuple[int, int]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    settings: Mapping[str, Any] = field(default_factory=dict)
    parser: Parser | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON; what isn't known is None."""
        return {
            "folder": str(self.folder),
            "images": len(self.rows),
            "software": f"mogle_rt {__version__}",
            "settings": dict(self.settings),
            "figures": {
                name: {**found.figure.to_dict(), "judge": found.judge, "higher_is_better": KINDS[name].higher}
                for name, found in self.figures.items()
            },
            "iou_of_classes": self.classes,
            "colours": {name: {"right": right, "of": count} for name, (right, count) in self.colours.items()},
            "skipped": self.skipped,
            "notes": self.notes,
            "rows": [
                {
                    "image": row.name,
                    "mask": None if row.mask is None else row.mask.name,
                    "real": None if row.real is None else row.real.name,
                    "prompt": row.prompt,
                    "seed": row.seed,
                    "seconds": row.seconds,
                }
                | {name: _number(values[i]) for name, values in self.values.items()}
                for i, row in enumerate(self.rows)
            ],
        }

    def write_json(self, path: Path) -> None:
        """Write it as JSON; a file that is there is replaced.

        Raises:
            OutputError: it can't be written.
        """
        with atomic_write(path) as file:
            file.write(
                json.dumps(self.to_dict(), indent=1, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
            )


def shown(name: str, value: float | None) -> str:
    """A figure as a table shows it."""
    kind = KINDS[name]
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.{kind.digits}f} %" if kind.unit == "%" else f"{value:.{kind.digits}f}"


def interval(name: str, figure: Figure) -> str:
    """The 95 % interval of a figure as a table shows it."""
    return "–" if figure.low is None else f"{shown(name, figure.low)} to {shown(name, figure.high)}"


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
