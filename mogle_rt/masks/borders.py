"""Colours between classes, as JPEG and smooth resizing make them at borders: settled, or refused."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mogle_rt.config import NUM_CLASSES
from mogle_rt.errors import MaskError
from mogle_rt.masks.classes import CLASS_NAMES, PALETTE, Labels

TOLERANCE = 25.0
"""Largest distance in RGB at which a colour counts as its nearest class: just under half of the least distance of two
class colours (51), so the nearest is never in doubt."""
BORDER = 16
"""JPEG and smooth resizing blend and ring around borders, within a JPEG block of 16 pixels. Colours that they make of the
classes within this many pixels are accepted there; elsewhere a colour beyond the tolerance is an error."""
SPECK = 16
"""In such a picture, fewer pixels of a class within a square of 9 x 9 are taken for an artefact, not for a region."""
EVEN = 3
"""Largest difference of neighbouring pixels, in each channel, within a patch of one colour."""
OVERSHOOT = 0.35
"""How far sharpening and ringing go beyond the colours at a border, in parts of their difference."""


def _distances(colours: NDArray[Any]) -> NDArray[np.float64]:
    """From colours to the classes' in RGB: [n, 3] -> [n, 19]."""
    difference: NDArray[np.float64] = colours[:, None].astype(np.float64) - PALETTE
    return np.sqrt((difference**2).sum(-1))


def _settle_borders(labels: Labels, sure: NDArray[np.bool_], picture: NDArray[np.uint8], what: str) -> None:
    """Decide every pixel that isn't inside a region of one class, in place.

    What lies between two regions may have no class's colour, or a third one's: on the way from hair to background is
    the lower lip's. So the solid regions are found first, then details too thin to be solid, unless a mixture of the
    regions beside them explains their colour. All other pixels become the nearest in colour of the classes near them.

    Raises:
        MaskError: a pixel has a colour that is no class's, and no mixture at a border either.
    """
    known = {c: sure & (labels == c) for c in np.unique(labels[sure])}
    solid = {c: _without_specks(_solid(region)) for c, region in known.items()}
    rows, columns = np.nonzero(~np.logical_or.reduce([*solid.values(), np.zeros_like(sure)]))
    colours, own, unsure = picture[rows, columns], labels[rows, columns], ~sure[rows, columns]

    def near(regions: dict[int, NDArray[np.bool_]]) -> NDArray[np.bool_]:
        """[pixels to decide, 19]: which classes have a pixel of their region within `BORDER`."""
        result = np.zeros((len(rows), NUM_CLASSES), dtype=bool)
        for c, region in regions.items():
            result[:, c] = _count(region, BORDER)[rows, columns] > 0
        return result

    around, choice = near(known), near(solid)
    thin = ~unsure & ~choice[np.arange(len(rows)), own]
    for a, b in itertools.combinations(solid, 2):
        between = np.flatnonzero(thin & choice[:, a] & choice[:, b])
        thin[between] = _from_mixture(colours[between], a, b) > 2 * TOLERANCE
    details = {}
    for c in np.unique(own[thin]):
        details[c] = np.zeros_like(sure)
        details[c][rows[thin & (own == c)], columns[thin & (own == c)]] = True
    choice |= near({c: _without_specks(region) for c, region in details.items()})
    choice |= around & ~choice.any(-1, keepdims=True)

    foreign = unsure & (around.sum(-1) < 2)
    for a, b in itertools.permutations(known, 2):  # a long wedge: only one of its sides is near
        beside = np.flatnonzero(foreign & around[:, a])
        foreign[beside] = _from_mixture(colours[beside], a, b) > 2 * TOLERANCE
    odd = unsure & ~foreign  # patches of a colour of their own, which no mixture of what is near explains
    for a, b in itertools.combinations(known, 2):
        between = np.flatnonzero(odd & around[:, a] & around[:, b])
        odd[between] = _from_mixture(colours[between], a, b) > TOLERANCE
    strange = np.zeros_like(sure)
    strange[rows[odd], columns[odd]] = True
    foreign |= _patches(strange, picture)[rows, columns]
    if 2 * sure.sum() < sure.size:  # no picture of regions
        foreign = unsure
    distance = _distances(colours)
    if foreign.any():
        i = int(foreign.argmax())
        nearest = int(distance[i].argmin())
        raise MaskError(
            f"{what}: pixel (x={columns[i]}, y={rows[i]}) has colour {_rgb(colours[i])}, which is no class's; the "
            f"nearest is {CLASS_NAMES[nearest]} {_rgb(PALETTE[nearest])}, {distance[i, nearest]:.0f} away "
            f"(tolerance {TOLERANCE:.0f})"
        )
    labels[rows, columns] = np.where(choice, distance, np.inf).argmin(-1)


def _count(region: NDArray[np.bool_], radius: int) -> NDArray[np.int32]:
    """How many pixels of a region are within ``radius`` of each pixel, in rows and columns."""
    size = 2 * radius + 1
    sums = np.pad(region, (radius + 1, radius)).cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32)
    return sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]


def _solid(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What of a region is covered by squares of 3 x 3 pixels within it."""
    return _count(_count(~region, 1) == 0, 1) > 0


def _patches(region: NDArray[np.bool_], picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """What of a region is evenly coloured, over 4 x 4 pixels at least. Blending and ringing leave no such patches."""
    even = region.copy()
    for axis in (0, 1):
        step = np.abs(np.diff(picture.astype(np.int16), axis=axis)).max(-1)
        even &= np.pad(step <= EVEN, [(0, int(i == axis)) for i in (0, 1)])
    return region & (_count(_count(even, 1) == 9, 1) > 0)


def _without_specks(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return region & (_count(region, 4) >= SPECK)


def _from_mixture(colours: NDArray[np.uint8], a: int, b: int) -> NDArray[np.float64]:
    """Distance of colours [n, 3] from the nearest mixture of two classes' colours."""
    start, line = PALETTE[a].astype(np.float64), PALETTE[b].astype(np.float64) - PALETTE[a]
    share = np.clip((colours - start) @ line / (line @ line), -OVERSHOOT, 1 + OVERSHOOT)
    mixture = np.clip(start + share[:, None] * line, 0, 255)
    return np.sqrt(((colours - mixture) ** 2).sum(-1))


def _rgb(colour: NDArray[np.uint8]) -> tuple[int, ...]:
    return tuple(int(v) for v in colour)
