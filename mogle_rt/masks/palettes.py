"""Read classes from colours: recognise our palette, and those of known tools, in pictures and in palette images."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mogle_rt.config import NUM_CLASSES
from mogle_rt.errors import MaskError
from mogle_rt.masks.borders import TOLERANCE, distances, settle
from mogle_rt.masks.classes import CLASS_NAMES, PALETTE, Labels
from mogle_rt.masks.orders import order_table

SAMPLE = 1 << 16  # the number of pixels in a sample of a picture
NO_REGIONS = 0.75
"""A picture is refused at once if more than this share of a sample is not in class colours. If half of a picture is in
class colours, the share in a sample never comes near this by chance."""
UNSURE = 128  # added to a label in the table of all colours if the colour is not within the tolerance


class Palette(NamedTuple):
    """Colours [K, 3] and the class of each [K]. None: they stand for the numbers 0 to K - 1 of the mask's order."""

    colours: NDArray[np.uint8]
    classes: Labels | None


def _voc(count: int) -> NDArray[np.uint8]:
    """PASCAL VOC's colours: a number's bits, lowest first, become the highest bits of red, green and blue in turn."""
    numbers = np.arange(count)[:, None]
    bits = [(numbers >> (3 * i + np.arange(3)) & 1) << (7 - i) for i in range(8)]
    return np.bitwise_or.reduce(bits).astype(np.uint8)


# The colours of face-parsing.PyTorch's pictures: those of numbers 1 to 18, then its white background, then the black
# background of its descendants.
_BISENET = np.array(
    [
        *((255, 85, 0), (255, 170, 0), (255, 0, 85), (255, 0, 170), (0, 255, 0), (85, 255, 0), (170, 255, 0)),
        *((0, 255, 85), (0, 255, 170), (0, 0, 255), (85, 0, 255), (170, 0, 255), (0, 85, 255), (0, 170, 255)),
        *((255, 255, 0), (255, 255, 85), (255, 255, 170), (255, 0, 255), (255, 255, 255), (0, 0, 0)),
    ],
    dtype=np.uint8,
)
OURS = Palette(PALETTE, np.arange(NUM_CLASSES, dtype=np.uint8))
BISENET = Palette(_BISENET, np.append(order_table("bisenet")[1:], [np.uint8(0), np.uint8(0)]))
VOC = Palette(_voc(NUM_CLASSES), None)


def from_palette(
    indices: NDArray[np.uint8], palette: NDArray[np.uint8], what: str
) -> tuple[NDArray[np.uint8], Labels | None]:
    """Find out what the pixels of a palette image mean.

    They are class numbers, with two exceptions: the palette holds the colours of a known palette in another order, or
    it holds greys that are class numbers themselves, as when a grey picture is saved as GIF.

    Args:
        indices: [H, W], the pixels.
        palette: [n, 3], the image's palette.
        what: the name of the image, for error messages.

    Returns:
        (numbers, None), or (anything, classes) if the colours identify classes.
    """
    used = np.flatnonzero(np.bincount(indices.ravel(), minlength=256))
    if used[-1] >= len(palette) or not palette.any():
        return indices, None
    colours = palette[used]
    table = np.zeros(256, dtype=np.uint8)
    if (colours == colours[:, :1]).all() and 0 < colours.max() < NUM_CLASSES:
        table[used] = colours[:, 0]
        return table[indices], None
    for known in (OURS, VOC, BISENET):
        squares = distances(colours, known.colours)
        nearest = squares.argmin(-1)
        if squares.min(-1).any() or (known is not OURS and _parts(nearest, known) < 2):
            continue
        if known.classes is None or (known is OURS and (nearest == used).all()):
            table[used] = nearest
            return table[indices], None
        table[used] = known.classes[nearest]
        return indices, table[indices]
    squares = distances(colours, PALETTE)
    exact = squares.min(-1) == 0
    moved = exact & (squares.argmin(-1) != used)
    if len(np.unique(squares[moved].argmin(-1))) >= 3 and 2 * np.isin(indices, used[exact]).sum() >= indices.size:
        # The palette holds class colours and blends of them, with other numbers than the classes'.
        return indices, from_colours(palette[indices], what)[1]
    return indices, None


def from_colours(picture: NDArray[np.uint8], what: str) -> tuple[NDArray[np.uint8], Labels | None]:
    """Find out what the colours [H, W, 3] of a picture mean.

    Returns:
        (numbers, None), or (anything, classes) if the colours identify classes.

    Raises:
        MaskError: there are colours that are not class colours.
    """
    if 0 < picture.max() < NUM_CLASSES and (picture == picture[..., :1]).all():
        return picture[..., 0].copy(), None  # class numbers, stored in three equal channels
    flat = picture.reshape(-1, 3)
    some = flat if len(flat) <= SAMPLE else flat[np.random.default_rng(0).integers(0, len(flat), SAMPLE)]
    palette = _recognise(some)
    if _share(some, palette) < 1 - NO_REGIONS:
        raise _refusal(picture, some, what)
    nearest, sure = _nearest(picture, palette)
    if not sure.all():
        if 2 * np.count_nonzero(sure) < sure.size:
            raise _refusal(picture, some, what)
        try:
            nearest = settle(nearest, sure, picture, palette.colours, _names(palette), what)
        except MaskError as error:
            raise MaskError(f"{error}{_hint(some)}") from None
    if palette.classes is None:
        return nearest, None
    return nearest, palette.classes[nearest]


def _names(palette: Palette) -> list[str]:
    classes = range(NUM_CLASSES) if palette.classes is None else palette.classes
    return [CLASS_NAMES[c] for c in classes]


def _parts(nearest: NDArray[Any], palette: Palette) -> int:
    """How many classes other than the background are among these entries of a palette."""
    classes = nearest if palette.classes is None else palette.classes[nearest]
    return len(np.setdiff1d(classes, [0]))


def _share(colours: NDArray[np.uint8], palette: Palette) -> float:
    """The share of colours [n, 3] that are class colours, within the tolerance."""
    return float((distances(colours, palette.colours).min(-1) <= TOLERANCE**2).mean())


def _recognise(colours: NDArray[np.uint8]) -> Palette:
    """Choose our palette, unless it has few of the colours (except backgrounds) and another palette has nearly all."""
    parts = colours[(colours.min(-1) < 255 - TOLERANCE) & (colours.max(-1) > TOLERANCE)]  # neither white nor black
    if len(parts) and _share(parts, OURS) < 0.5:
        for other in (BISENET, VOC):
            squares = distances(parts, other.colours)
            sure = squares.min(-1) <= TOLERANCE**2
            if sure.mean() > 0.9 and _parts(squares.argmin(-1)[sure], other) >= 2:
                return other
    return OURS


def _nearest(picture: NDArray[np.uint8], palette: Palette) -> tuple[Labels, NDArray[np.bool_]]:
    """The palette entry nearest to each pixel, and whether it is within the tolerance.

    Each distinct colour is computed once, for a table of all 2²⁴ colours, so memory doesn't grow with their number.
    """

    def codes(rows: NDArray[np.uint8]) -> NDArray[np.uint32]:
        weights = np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
        return np.matmul(rows, weights, dtype=np.uint32)

    step = max(1, (1 << 20) // picture.shape[1])
    seen = np.zeros(1 << 24, dtype=bool)
    for y in range(0, len(picture), step):
        seen[codes(picture[y : y + step])] = True
    found = np.flatnonzero(seen).astype(np.uint32)
    table = np.empty(1 << 24, dtype=np.uint8)
    for part in np.array_split(found, -(-len(found) // (1 << 18))):
        colours = np.stack([part >> 16, part >> 8 & 255, part & 255], axis=-1)
        squares = distances(colours, palette.colours)
        table[part] = squares.argmin(-1) + np.where(squares.min(-1) <= TOLERANCE**2, 0, UNSURE)
    labels = np.empty(picture.shape[:2], dtype=np.uint8)
    for y in range(0, len(picture), step):
        labels[y : y + step] = table[codes(picture[y : y + step])]
    return labels & np.uint8(UNSURE - 1), labels < UNSURE


def _refusal(picture: NDArray[np.uint8], some: NDArray[np.uint8], what: str) -> MaskError:
    """The error for a picture that is mostly not in class colours. It names the first such pixel."""
    for y, row in enumerate(picture):  # noqa: B007
        squares = distances(row, PALETTE)
        x = int((squares.min(-1) > TOLERANCE**2).argmax())
        if squares[x].min() > TOLERANCE**2:
            break
    nearest = int(squares[x].argmin())
    return MaskError(
        f"{what}: pixel (x={x}, y={y}) has colour {tuple(row[x].tolist())}, which is not a class colour; the nearest is "
        f"{CLASS_NAMES[nearest]} {tuple(PALETTE[nearest].tolist())}, {squares[x, nearest] ** 0.5:.0f} away (tolerance "
        f"{TOLERANCE:.0f}){_hint(some) or '; most of the picture has no class colour: is it a photograph?'}"
    )


def _hint(some: NDArray[np.uint8]) -> str:
    """A hint at what a refused picture seems to be, from a sample of its colours."""
    if np.isin(some, (0, 255)).all() and (some == some[:, :1]).all():
        return PLANE_HINT
    if (1 - _share(some[:, ::-1], OURS)) < (1 - _share(some, OURS)) / 2:
        return "; its colours seem to be in OpenCV's order (blue, green, red); give picture[..., ::-1]"
    return ""


PLANE_HINT = (
    "; a picture of only 0 and 255 is the black-and-white plane of one class: merge the planes of all classes with "
    "mogle_rt.masks.from_planes"
)
