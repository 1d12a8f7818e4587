"""Which class a number stands for: the orders of face parsers, and a warning if a mask fits another order better."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mogle_rt.errors import MaskError
from mogle_rt.masks.classes import CLASS_NAMES, Labels

Order: TypeAlias = str | Sequence[str]

ORDERS: dict[str, tuple[str, ...]] = {
    "celebamask": CLASS_NAMES,
    # face-parsing.PyTorch and its descendants
    "bisenet": (
        *("background", "skin", "l_brow", "r_brow", "l_eye", "r_eye", "eye_glasses", "l_ear", "r_ear", "ear_ring"),
        *("nose", "mouth", "u_lip", "l_lip", "neck", "necklace", "cloth", "hair", "hat"),
    ),
    # facer's "farl/celebm". FaRL's training data pairs CelebAMask-HQ's l_ear with number 4, r_ear with 5, and so on.
    "farl": (
        *("background", "neck", "skin", "cloth", "l_ear", "r_ear", "l_brow", "r_brow", "l_eye", "r_eye"),
        *("nose", "mouth", "l_lip", "u_lip", "hair", "eye_glasses", "hat", "ear_ring", "necklace"),
    ),
}
SHORT_NAMES = {"eye_g": "eye_glasses", "ear_r": "ear_ring", "neck_l": "necklace"}
"""The names in CelebAMask-HQ's own files that differ from ours."""

# Relative positions, by which orders are scored: each line holds a class and the classes below it in an upright face.
ABOVE = {
    "l_brow": ("l_eye", "nose"),
    "r_brow": ("r_eye", "nose"),
    "l_eye": ("nose", "u_lip", "l_lip"),
    "r_eye": ("nose", "u_lip", "l_lip"),
    "eye_glasses": ("nose", "u_lip"),
    "nose": ("u_lip", "mouth", "l_lip", "neck"),
    "u_lip": ("l_lip", "neck"),
    "l_lip": ("neck",),
    "skin": ("neck", "cloth"),
    "hair": ("neck", "cloth"),
    "hat": ("skin", "nose", "neck"),
    "neck": ("cloth",),
}
FEATURES = ("nose", "l_eye", "r_eye", "l_brow", "r_brow", "mouth", "u_lip", "l_lip")
"""Parts whose mean position lies within the bounding box of the skin, and that are smaller than the skin."""
FEWEST_RELATIONS = 12  # fewer relations than this could all hold by chance
GOOD_FIT, POOR_FIT = 0.9, 0.78
SAMPLE = 256  # the most rows and columns of a mask that are sampled


def class_name(name: Any) -> str:
    """The name of a class, which is given by this name or by the one in CelebAMask-HQ's files.

    Raises:
        MaskError: there is no such class.
    """
    known = SHORT_NAMES.get(name, name) if isinstance(name, str) else name
    if known not in CLASS_NAMES:
        raise MaskError(f"{name!r} is not a class; classes are {', '.join(CLASS_NAMES)}")
    return str(known)


def order_table(order: Order) -> Labels:
    """The class of each number: uint8 [n].

    Args:
        order: "celebamask", "bisenet", "farl", or the names of the classes from number 0 on.

    Raises:
        MaskError: the order is unknown, or a name is not that of a class.
    """
    if isinstance(order, str):
        if order not in ORDERS:
            raise MaskError(f"order must be {', '.join(ORDERS)} or a list of class names, got {order!r}")
        names: Sequence[str] = ORDERS[order]
    elif isinstance(order, Sequence) and 0 < len(order) <= 256:
        names = [class_name(name) for name in order]
    else:
        raise MaskError(f"order must be {', '.join(ORDERS)} or a list of class names, got {order!r}"[:200])
    return np.array([CLASS_NAMES.index(name) for name in names], dtype=np.uint8)


def warn_of_another_order(numbers: Labels, table: Labels, what: str, *, coloured: bool = False) -> None:
    """Warn if a mask's numbers make a plausible face in another order, but not in this one.

    Args:
        numbers: uint8 [H, W], the numbers as given.
        table: the class of each number, see `order_table`.
        what: the name of the mask, for the warning.
        coloured: whether the numbers were read from colours, to which an order doesn't apply.
    """
    places = _places(numbers)
    own, relations = _fit(places, table)
    turned = (_fit(_places(np.rot90(numbers, k)), table)[0] for k in (1, 2, 3))  # a rotated face is also plausible
    if own > POOR_FIT or len(places) < 4 or max(turned) >= GOOD_FIT:
        return
    fits = {}
    for name in ORDERS:
        other = order_table(name)
        if max(places) < len(other):
            fits[name], count = _fit(places, other)
            if count < max(FEWEST_RELATIONS, relations // 2):
                fits[name] = 0.0
    best = max(fits, key=lambda name: fits[name], default="")
    if best and fits[best] >= GOOD_FIT:
        advice = (
            f"its colours seem to come from numbers in that order; give the numbers themselves, with order={best!r}"
            if coloured
            else f"pass order={best!r} (mask_order= of the pipeline, --mask-order on the command line)"
        )
        warnings.warn(
            f"{what}: the parts of the face lie in the wrong places ({own:.0%} of their positions are right); in the order "
            f"{best!r} {fits[best]:.0%} are: {advice}",
            stacklevel=2,
        )


def _places(numbers: Labels) -> dict[int, NDArray[np.float64]]:
    """For each number in a mask: how many pixels have it, their mean row and column, and their first and last ones."""
    height, width = numbers.shape
    small = numbers[:: -(-height // SAMPLE), :: -(-width // SAMPLE)]
    rows, columns = (grid.ravel() for grid in np.indices(small.shape))
    places = {}
    for number in np.unique(small):
        here = np.flatnonzero(small.ravel() == number)
        y, x = rows[here], columns[here]
        places[int(number)] = np.array([len(here), y.mean(), x.mean(), y.min(), y.max(), x.min(), x.max()])
    return places


def _fit(places: dict[int, NDArray[np.float64]], table: Labels) -> tuple[float, int]:
    """The share of expected relations that hold, among those whose classes are in the mask, and the number of those."""
    at = {CLASS_NAMES[table[number]]: place for number, place in places.items() if number < len(table)}
    held = [at[a][1] < at[b][1] for a, lower in ABOVE.items() for b in lower if a in at and b in at]
    if "skin" in at:
        count, *_, top, bottom, left, right = at["skin"]
        for name in FEATURES:
            if name in at:
                _, y, x, *_ = at[name]
                held += [top <= y <= bottom and left <= x <= right, at[name][0] < count]
    return (float(np.mean(held)) if held else 1.0), len(held)
