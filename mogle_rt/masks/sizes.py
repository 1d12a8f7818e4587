"""The size at which an image of a mask is drawn: of the mask's own shape, at the model's own area."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from mogle_rt.config import PATCH
from mogle_rt.masks.classes import Labels

DISTORTION = 0.05
"""How much of a change of a mask's ratio of width to height is passed over in silence. Sizes are multiples of 16, so that a
few percent can't be avoided in small pictures."""


def default_size(masks: Sequence[Labels], side: int) -> tuple[int, int]:
    """The height and width for masks when none is given.

    Both are multiples of 16, their ratio is that of the masks, and their product is about ``side`` squared. Masks whose
    ratios differ by more than `DISTORTION` share no such size: then it is the model's own square.

    Args:
        masks: label maps [H, W]. side: of the square that the model draws by itself.
    """
    ratios = [labels.shape[1] / labels.shape[0] for labels in masks]
    if max(ratios) / min(ratios) > 1 + DISTORTION:
        return side, side
    root = math.sqrt(ratios[0])
    most = side * side // PATCH  # a side of 16 leaves this for the other
    height, width = (min(most, max(PATCH, round(size / PATCH) * PATCH)) for size in (side / root, side * root))
    return height, width


def warn_of_distortion(masks: Sequence[Labels], height: int, width: int) -> None:
    """Warn where a size stretches masks, by more than `DISTORTION`; a mask without extent in one direction has no shape."""
    for i, labels in enumerate(masks):
        h, w = labels.shape
        change = (width / height) / (w / h)
        if max(change, 1 / change) > 1 + DISTORTION:
            fitting = default_size([labels], round(math.sqrt(height * width)))
            if fitting == (height, width):  # multiples of 16 come no nearer
                continue
            name = "the mask" if len(masks) == 1 else f"mask {i}"
            warnings.warn(
                f"{name} is {w} x {h} pixels, width by height, and is stretched to {width} x {height}; {fitting[1]} x "
                f"{fitting[0]} would keep its shape",
                stacklevel=2,
            )
            return
