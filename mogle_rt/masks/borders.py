"""Decide the class of blended colours, which JPEG and smooth resizing make at borders, or refuse the picture.

The decision for a pixel depends only on pixels within `HALO` of it, so a picture is processed tile by tile, in bounded
memory. The set of classes near a pixel is held as the bits of one number, so one pass over a tile handles all classes.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mogle_rt.errors import MaskError
from mogle_rt.masks.classes import Labels

TOLERANCE = 25.0
"""The largest distance in RGB at which a colour counts as its nearest class. It is just under half of the smallest
distance between two class colours (51), so the nearest class is never in doubt."""
BORDER = 16
"""JPEG and smooth resizing cause blending and ringing around borders, within a JPEG block of 16 pixels. Colours that
can result from the classes within this many pixels are accepted; any other colour beyond the tolerance is an error."""
SPECK = 16
"""In such a picture, fewer pixels than this of a class within 9 x 9 pixels count as an artefact, not as a region."""
EVEN = 3
"""The largest difference between neighbouring pixels, in each channel, within a patch of one colour."""
OVERSHOOT = 0.35
"""How far sharpening and ringing go beyond the two colours at a border, as a fraction of their difference."""
MOST_COMPARED = 16_000_000
"""Colours of a picture that are compared with mixtures of two classes, each pair counted by itself. A large mask of few
regions takes a million. A picture that is all borders of all classes would take hundreds of millions, and minutes."""
TILE = 1024
HALO = 48
"""Larger than the distance that a decision depends on, which is the sum of: a detail within BORDER, its 9 x 9 square
(4), regions within BORDER of that, their 9 x 9 squares (4), and the 3 x 3 squares that make them solid (2)."""

Bits = NDArray[np.uint32]


class _Foreign(NamedTuple):
    """A pixel whose colour is not that of a class, with the nearest class and its distance."""

    y: int
    x: int
    nearest: int
    distance: float


class _Mixtures:
    """Compares colours with mixtures of two classes, up to `MOST_COMPARED` of them in a picture.

    Args:
        what: names the picture.
    """

    def __init__(self, what: str) -> None:
        self._what, self._left = what, MOST_COMPARED

    def distance(self, colours: NDArray[np.uint8], a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Distances of colours [n, 3] from the nearest mixture of two colours, [n].

        Raises:
            MaskError: the picture has more borders than any mask.
        """
        self._left -= len(colours)
        if self._left < 0:
            raise MaskError(
                f"{self._what}: too many of its colours lie between those of two classes; save the mask without "
                "smoothing, or smaller"
            )
        return _from_mixture(colours, a, b)


def distances(colours: NDArray[Any], palette: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Squared distances in RGB: [n, 3] and [K, 3] -> [n, K]. They are exact, as all terms are integers below 2²⁴."""
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
    """Decide the class of every pixel that isn't inside a region of one class.

    A blend of two regions may have no class's colour, or that of a third class: the blend of hair and background passes
    through the lower lip's colour. So solid regions are found first. Details that are too thin to be solid come next,
    unless their colour can be a blend of the regions beside them. All other pixels get the class that is nearest in
    colour among the classes near them.

    Args:
        labels: [H, W], the palette entry that is nearest in colour.
        sure: [H, W], whether that entry is within the tolerance.
        picture: [H, W, 3], the pixels' colours.
        palette: [K, 3], K at most 32.
        names: the names of the palette's entries.
        what: the name of the picture, for error messages.

    Returns:
        [H, W], entries of the palette.

    Raises:
        MaskError: a pixel's colour is not that of a class, and can't be a blend at a border either.
    """
    height, width = labels.shape
    known = np.unique(labels[sure]).tolist()
    settled, mixtures = labels.copy(), _Mixtures(what)
    for top in range(0, height, TILE):
        foreign: list[_Foreign] = []
        for left in range(0, width, TILE):
            y0, x0 = max(0, top - HALO), max(0, left - HALO)
            around = np.s_[y0 : top + TILE + HALO, x0 : left + TILE + HALO]
            if sure[around].all() and labels[around].min() == labels[around].max():
                continue
            inner = np.s_[top - y0 : top - y0 + TILE, left - x0 : left - x0 + TILE]
            tile, wrong = _settle_tile(labels[around], sure[around], picture[around], palette, known, inner, mixtures)
            settled[top : top + TILE, left : left + TILE] = tile[inner]
            if wrong is not None:
                foreign.append(wrong._replace(y=wrong.y + y0, x=wrong.x + x0))
        if foreign:
            first = min(foreign)
            raise MaskError(
                f"{what}: pixel (x={first.x}, y={first.y}) has colour {tuple(picture[first.y, first.x].tolist())}, which is "
                f"not a class colour; the nearest is {names[first.nearest]} {tuple(palette[first.nearest].tolist())}, "
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
    mixtures: _Mixtures,
) -> tuple[Labels, _Foreign | None]:
    """Process one tile with its halo: return its labels, and the first pixel within ``inner`` that can't be decided."""
    bits = np.where(sure, np.uint32(1) << labels.astype(np.uint32), np.uint32(0))
    solid = _without_specks(_spread(_shrink(bits, 1, outside=True), 1))
    rows, columns = np.nonzero(solid == 0)
    colours, own, unsure = picture[rows, columns], labels[rows, columns], ~sure[rows, columns]
    around, choice = _spread(bits, BORDER)[rows, columns], _spread(solid, BORDER)[rows, columns]

    thin = ~unsure & ~_has(choice, own)
    for a, b in itertools.combinations(_members(choice[thin], known), 2):
        between = np.flatnonzero(thin & _has(choice, a) & _has(choice, b))
        thin[between] = mixtures.distance(colours[between], palette[a], palette[b]) > 2 * TOLERANCE
    if thin.any():
        details = np.zeros_like(bits)
        details[rows[thin], columns[thin]] = np.uint32(1) << own[thin].astype(np.uint32)
        choice |= _spread(_without_specks(details), BORDER)[rows, columns]
    choice = np.where(choice == 0, around, choice)

    foreign = unsure & (around & (around - np.uint32(1)) == 0)  # fewer than two classes are near
    for a in _members(around[foreign], known):  # accept long wedges of blended colour, where only one side is near
        for b in known:
            if a != b:
                beside = np.flatnonzero(foreign & _has(around, a))
                foreign[beside] = mixtures.distance(colours[beside], palette[a], palette[b]) > 2 * TOLERANCE
    odd = unsure & ~foreign  # find patches of one colour that is no blend of the classes near them
    for a, b in itertools.combinations(_members(around[odd], known), 2):
        between = np.flatnonzero(odd & _has(around, a) & _has(around, b))
        odd[between] = mixtures.distance(colours[between], palette[a], palette[b]) > TOLERANCE
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
    """Whether each set contains the class ``entry``."""
    return (bits >> np.asarray(entry, dtype=np.uint32) & 1).astype(bool)


def _members(bits: Bits, known: list[int]) -> list[int]:
    """The classes that are in any of the sets."""
    union = int(np.bitwise_or.reduce(bits, axis=None)) if bits.size else 0
    return [c for c in known if union >> c & 1]


def _spread(bits: Bits, radius: int) -> Bits:
    """For each pixel, the union of the sets within ``radius`` pixels, in rows and columns."""
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
    """For each pixel, the intersection of the sets within ``radius`` pixels, in rows and columns.

    Pixels outside the picture count as containing every class if ``outside``, otherwise as containing none.
    """
    inverse = ~np.pad(bits, radius, constant_values=np.iinfo(bits.dtype).max if outside else 0)
    spread = ~_spread(inverse, radius)
    return spread[radius:-radius, radius:-radius]


def _count(region: NDArray[np.bool_], radius: int) -> NDArray[np.int32]:
    """For each pixel, how many pixels of a region are within ``radius`` of it, in rows and columns."""
    size = 2 * radius + 1
    sums = np.pad(region, (radius + 1, radius)).cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32)
    return sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]


def _without_specks(bits: Bits) -> Bits:
    """Remove pixels that have fewer than `SPECK` of their class within 9 x 9. Each set contains one class or none."""
    large = _spread(_shrink(bits, 2, outside=False), 2)  # pixels in a 5 x 5 square of their class have enough
    doubtful = bits & ~large
    result = bits.copy()
    for c in _members(doubtful, list(range(32))):
        region = _has(bits, c)
        result[region & (_count(region, 4) < SPECK)] = 0
    return result


def _patches(region: NDArray[np.bool_], picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The evenly coloured parts of a region, of at least 4 x 4 pixels. Blending and ringing leave no such patches."""
    even = region.copy()
    for axis in (0, 1):
        step = np.abs(np.diff(picture.astype(np.int16), axis=axis)).max(-1)
        even &= np.pad(step <= EVEN, [(0, int(i == axis)) for i in (0, 1)])
    return region & (_count(_count(even, 1) == 9, 1) > 0)


def _from_mixture(colours: NDArray[np.uint8], a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The distances [n] of colours [n, 3] from their nearest blends of two colours."""
    start = a.astype(np.float64)
    line = b - start
    share = np.clip((colours - start) @ line / (line @ line), -OVERSHOOT, 1 + OVERSHOOT)
    mixture = np.clip(start + share[:, None] * line, 0, 255)
    return np.sqrt(((colours - mixture) ** 2).sum(-1))
