"""Colours between classes, as JPEG and smooth resizing make them at borders: settled, or refused.

What is decided of a pixel depends on pixels within `HALO` of it, so a picture is settled tile by tile, in bounded memory.
Sets of classes near a pixel are bits of one number: one pass over a tile serves all classes.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mogle_rt.errors import MaskError
from mogle_rt.masks.classes import Labels

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
TILE = 1024
HALO = 48
"""More than a decision looks at: a detail within BORDER, its 9 x 9 square (4), regions within BORDER of that, their 9 x 9
squares (4) and the squares of 3 x 3 that make them solid (2)."""

Bits = NDArray[np.uint32]


class _Foreign(NamedTuple):
    """A pixel whose colour is no class's, and the nearest class."""

    y: int
    x: int
    nearest: int
    distance: float


def distances(colours: NDArray[Any], palette: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Squares of the distances in RGB: [n, 3] and [K, 3] -> [n, K]. Exact: all terms are integers below 2²⁴."""
    c, p = colours.astype(np.float32), palette.astype(np.float32)
    result: NDArray[np.float32] = c @ (-2 * p.T)
    result += (c * c).sum(-1, keepdims=True)
    result += (p * p).sum(-1)
    return result


def settle(
    labels: Labels,
    sure: NDArray[np.bool_],
    picture: NDArray[np.uint8],
    palette: NDArray[np.uint8],
    names: list[str],
    what: str,
) -> Labels:
    """Decide every pixel that isn't inside a region of one class.

    What lies between two regions may have no class's colour, or a third one's: on the way from hair to background is
    the lower lip's. So the solid regions are found first, then details too thin to be solid, unless a mixture of the
    regions beside them explains their colour. All other pixels become the nearest in colour of the classes near them.

    Args:
        labels: [H, W], the entry of the palette that is nearest in colour. sure: [H, W], whether it is near enough.
        picture: [H, W, 3]. palette: [K, 3], K at most 32. names: of the palette's entries. what: names the picture.

    Returns:
        [H, W], entries of the palette.

    Raises:
        MaskError: a pixel has a colour that is no class's, and no mixture at a border either.
    """
    height, width = labels.shape
    known = np.unique(labels[sure]).tolist()
    settled = labels.copy()
    for top in range(0, height, TILE):
        foreign: list[_Foreign] = []
        for left in range(0, width, TILE):
            y0, x0 = max(0, top - HALO), max(0, left - HALO)
            around = np.s_[y0 : top + TILE + HALO, x0 : left + TILE + HALO]
            if sure[around].all() and labels[around].min() == labels[around].max():
                continue
            inner = np.s_[top - y0 : top - y0 + TILE, left - x0 : left - x0 + TILE]
            tile, wrong = _settle_tile(labels[around], sure[around], picture[around], palette, known, inner)
            settled[top : top + TILE, left : left + TILE] = tile[inner]
            if wrong is not None:
                foreign.append(wrong._replace(y=wrong.y + y0, x=wrong.x + x0))
        if foreign:
            first = min(foreign)
            raise MaskError(
                f"{what}: pixel (x={first.x}, y={first.y}) has colour {tuple(picture[first.y, first.x].tolist())}, which is "
                f"no class's; the nearest is {names[first.nearest]} {tuple(palette[first.nearest].tolist())}, "
                f"{first.distance:.0f} away (tolerance {TOLERANCE:.0f})"
            )
    return settled


def _settle_tile(
    labels: Labels,
    sure: NDArray[np.bool_],
    picture: NDArray[np.uint8],
    palette: NDArray[np.uint8],
    known: list[int],
    inner: tuple[slice, slice],
) -> tuple[Labels, _Foreign | None]:
    """One tile with its halo: the labels, and the first pixel within ``inner`` that can't be decided."""
    bits = np.where(sure, np.uint32(1) << labels.astype(np.uint32), np.uint32(0))
    solid = _without_specks(_spread(_shrink(bits, 1, outside=True), 1))
    rows, columns = np.nonzero(solid == 0)
    colours, own, unsure = picture[rows, columns], labels[rows, columns], ~sure[rows, columns]
    around, choice = _spread(bits, BORDER)[rows, columns], _spread(solid, BORDER)[rows, columns]

    thin = ~unsure & ~_has(choice, own)
    for a, b in itertools.combinations(_members(choice[thin], known), 2):
        between = np.flatnonzero(thin & _has(choice, a) & _has(choice, b))
        thin[between] = _from_mixture(colours[between], palette[a], palette[b]) > 2 * TOLERANCE
    if thin.any():
        details = np.zeros_like(bits)
        details[rows[thin], columns[thin]] = np.uint32(1) << own[thin].astype(np.uint32)
        choice |= _spread(_without_specks(details), BORDER)[rows, columns]
    choice = np.where(choice == 0, around, choice)

    foreign = unsure & (around & (around - np.uint32(1)) == 0)  # fewer than two classes near
    for a in _members(around[foreign], known):  # a long wedge: only one of its sides is near
        for b in known:
            if a != b:
                beside = np.flatnonzero(foreign & _has(around, a))
                foreign[beside] = _from_mixture(colours[beside], palette[a], palette[b]) > 2 * TOLERANCE
    odd = unsure & ~foreign  # patches of a colour of their own, which no mixture of what is near explains
    for a, b in itertools.combinations(_members(around[odd], known), 2):
        between = np.flatnonzero(odd & _has(around, a) & _has(around, b))
        odd[between] = _from_mixture(colours[between], palette[a], palette[b]) > TOLERANCE
    if odd.any():
        strange = np.zeros_like(sure)
        strange[rows[odd], columns[odd]] = True
        foreign |= _patches(strange, picture)[rows, columns]

    squares = distances(colours, palette)
    wrong = None
    inside = np.zeros_like(sure)
    inside[inner] = True
    here = np.flatnonzero(foreign & inside[rows, columns])
    if len(here):
        i = here[0]
        nearest = int(squares[i].argmin())
        wrong = _Foreign(int(rows[i]), int(columns[i]), nearest, float(squares[i, nearest] ** 0.5))
    settled = labels.copy()
    for k in range(len(palette)):
        squares[~_has(choice, k), k] = np.inf
    settled[rows, columns] = squares.argmin(-1)
    return settled, wrong


def _has(bits: Bits, entry: int | Labels) -> NDArray[np.bool_]:
    """Whether sets of classes hold one."""
    return (bits >> np.asarray(entry, dtype=np.uint32) & 1).astype(bool)


def _members(bits: Bits, known: list[int]) -> list[int]:
    """Which classes any of the sets holds."""
    union = int(np.bitwise_or.reduce(bits, axis=None)) if bits.size else 0
    return [c for c in known if union >> c & 1]


def _spread(bits: Bits, radius: int) -> Bits:
    """The union of the sets within so many pixels, in rows and columns."""
    for axis in (0, 1):
        bits = np.pad(bits, [(radius, radius) if i == axis else (0, 0) for i in (0, 1)])
        bits = np.moveaxis(bits, axis, 0)
        size = 1
        while size < 2 * radius + 1:
            step = min(size, 2 * radius + 1 - size)
            bits = bits[:-step] | bits[step:]
            size += step
        bits = np.moveaxis(bits, 0, axis)
    return bits


def _shrink(bits: Bits, radius: int, *, outside: bool) -> Bits:
    """What all sets within so many pixels have in common; outside of the picture is everything, or nothing."""
    inverse = ~np.pad(bits, radius, constant_values=np.iinfo(bits.dtype).max if outside else 0)
    spread = ~_spread(inverse, radius)
    return spread[radius:-radius, radius:-radius]


def _count(region: NDArray[np.bool_], radius: int) -> NDArray[np.int32]:
    """How many pixels of a region are within ``radius`` of each pixel, in rows and columns."""
    size = 2 * radius + 1
    sums = np.pad(region, (radius + 1, radius)).cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32)
    return sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]


def _without_specks(bits: Bits) -> Bits:
    """Without pixels that have fewer than `SPECK` of their class within 9 x 9. Each set holds one label or none."""
    large = _spread(_shrink(bits, 2, outside=False), 2)  # in a square of 5 x 5: that is enough
    doubtful = bits & ~large
    result = bits.copy()
    for c in _members(doubtful, list(range(32))):
        region = _has(bits, c)
        result[region & (_count(region, 4) < SPECK)] = 0
    return result


def _patches(region: NDArray[np.bool_], picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """What of a region is evenly coloured, over 4 x 4 pixels at least. Blending and ringing leave no such patches."""
    even = region.copy()
    for axis in (0, 1):
        step = np.abs(np.diff(picture.astype(np.int16), axis=axis)).max(-1)
        even &= np.pad(step <= EVEN, [(0, int(i == axis)) for i in (0, 1)])
    return region & (_count(_count(even, 1) == 9, 1) > 0)


def _from_mixture(colours: NDArray[np.uint8], a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Distance of colours [n, 3] from the nearest mixture of two colours."""
    start = a.astype(np.float64)
    line = b - start
    share = np.clip((colours - start) @ line / (line @ line), -OVERSHOOT, 1 + OVERSHOOT)
    mixture = np.clip(start + share[:, None] * line, 0, 255)
    return np.sqrt(((colours - mixture) ** 2).sum(-1))
