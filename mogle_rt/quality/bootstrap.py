"""How sure a figure is: what it would have been on other images of the same kind, by the bootstrap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

COVERAGE = 0.95
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Figure:
    """A measured figure.

    Attributes:
        value: as measured on all images.
        low, high: the ends of its 95 % interval; None where it was not computed.
        count: the number of images that it is of.
    """

    value: float
    count: int
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"value": self.value, "low": self.low, "high": self.high, "images": self.count}


def draws(groups: NDArray[Any], resamples: int, seed: int) -> Counts:
    """How many times each image counts in each resample: int64 [resamples, n].

    Images of one group, such as those of the same mask, are not independent, so groups are drawn, not images.

    Args:
        groups: of each image, the name of its group, [n].
    """
    names, group = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(seed)
    return rng.multinomial(len(names), np.full(len(names), 1 / len(names)), resamples)[:, group.ravel()]


def figure(value: float, replicates: Floats, count: int) -> Figure:
    """A figure with the interval that the bootstrap gives it.

    The interval is the spread of the replicates about their own mean, set about the value. A distance between sets is
    larger on every resample, because an image that occurs twice makes the set narrower; without this shift the interval
    could miss the value itself.

    Args:
        replicates: what was measured on each resample, [resamples]; empty for none.
    """
    replicates = replicates[np.isfinite(replicates)]
    if len(replicates) < 2:
        return Figure(value, count)
    low, high = np.quantile(replicates, ((1 - COVERAGE) / 2, (1 + COVERAGE) / 2)) - replicates.mean()
    return Figure(value, count, value + float(low), value + float(high))


def of_mean(values: Floats, groups: NDArray[Any], resamples: int, seed: int) -> Figure:
    """The mean of values, one of each image; those that are NaN don't count."""
    there = ~np.isnan(values)
    values, groups = values[there], groups[there]
    counts = draws(groups, resamples, seed)
    with np.errstate(invalid="ignore"):
        return figure(float(values.mean()), counts @ values / counts.sum(1), len(values))
