"""Refuse class numbers that were smoothed by resizing, which makes bands of wrong numbers between two regions."""

from __future__ import annotations

import numpy as np

from mogle_rt.errors import MaskError
from mogle_rt.masks.classes import Labels

FEWEST_STEPS = 12  # fewer steps than this can occur by chance
STEPS_PER_EDGE = 0.2
"""In a smoothed mask, a third or more of all borders are steps on the way from one region to another. In masks with
sharp borders, even small masks, only a few percent of the borders look like steps by chance."""


def refuse_smoothed(numbers: Labels, what: str) -> None:
    """Refuse smoothed class numbers [H, W]. ``what`` names the mask.

    Raises:
        MaskError: between regions, the numbers pass through those in between.
    """
    steps = edges = 0
    for one in (numbers, numbers.T):
        # Find the runs of one number in each row. A step is a run of at most three pixels between a lower and a higher
        # number.
        changes = one[:, 1:] != one[:, :-1]
        edges += int(np.count_nonzero(changes))
        ends = np.flatnonzero(np.pad(changes, ((0, 0), (0, 1)), constant_values=True).ravel())
        if len(ends) < 3:
            continue
        values, rows = one.ravel()[ends].astype(np.int16), ends // one.shape[1]
        lengths = np.diff(ends)[:-1]
        rising = (values[:-2] < values[1:-1]) & (values[1:-1] < values[2:])
        falling = (values[:-2] > values[1:-1]) & (values[1:-1] > values[2:])
        steps += int(np.count_nonzero((rising | falling) & (lengths <= 3) & (rows[:-2] == rows[2:])))
    if steps >= FEWEST_STEPS and steps > STEPS_PER_EDGE * edges and 4 * edges < numbers.size:
        raise MaskError(
            f"{what}: its class numbers were smoothed, probably by resizing: between two regions there are bands of "
            "the numbers in between; resize masks by nearest neighbour, or as a picture in the class colours"
        )
