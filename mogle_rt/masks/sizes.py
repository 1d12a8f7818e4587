"""The size of an image for a mask: it has the mask's aspect ratio and about the model's number of pixels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from mogle_rt.config import PATCH
from mogle_rt.masks.classes import Labels

DISTORTION = 0.05
"""The largest change of a mask's aspect ratio that causes no warning. Sizes are multiples of 16, so a change of a few
percent is unavoidable in small pictures."""
DEFAULT_SIZE = 512  # pixels of a side; models that were made for this size draw other sizes too
MOST_RATIO = 2.0  # a small model draws well up to this ratio of an image's pixels to those of its own square


def default_size(masks: Sequence[Labels], side: int) -> tuple[int, int]:
    """The default height and width of images for these masks.

    Both are multiples of 16, their ratio is that of the masks, and their product is about ``side`` squared. If the
    masks' ratios differ by more than `DISTORTION`, no such size suits all of them, and it is the model's square.

    Args:
        masks: label maps [H, W].
        side: the side of the square that the model draws by default, in pixels.
    """
    ratios = [labels.shape[1] / labels.shape[0] for labels in masks]
    if max(ratios) / min(ratios) > 1 + DISTORTION:
        return side, side
    root = math.sqrt(ratios[0])
    most = side * side // PATCH  # the longest side: the other is then 16
    height, width = (min(most, max(PATCH, round(size / PATCH) * PATCH)) for size in (side / root, side * root))
    return height, width


def warn_of_distortion(masks: Sequence[Labels], height: int, width: int) -> None:
    """Warn of the first mask whose aspect ratio changes by more than `DISTORTION`, if another size fits it better."""
    for i, labels in enumerate(masks):
        h, w = labels.shape
        change = (width / height) / (w / h)
        if max(change, 1 / change) > 1 + DISTORTION:
            fitting = default_size([labels], round(math.sqrt(height * width)))
            if fitting == (height, width):  # no multiples of 16 come nearer to the mask's ratio
                continue
            name = "the mask" if len(masks) == 1 else f"mask {i}"
            warnings.warn(
                f"{name} is {w} x {h} pixels, width by height, and is stretched to {width} x {height}; {fitting[1]} x "
                f"{fitting[0]} would keep its shape",
                stacklevel=2,
            )
            return


def warn_of_other_size(height: int, width: int, side: int) -> None:
    """Warn where a model that was made for small images is asked for much larger or smaller ones: they are no faces.

    Args:
        height, width: pixels, as asked for. side: of the square that the model draws by itself.
    """
    ratio = height * width / side**2
    if side < DEFAULT_SIZE and not 1 / MOST_RATIO < ratio < MOST_RATIO:
        warnings.warn(
            f"this model was made for images of {side} x {side} pixels; at {width} x {height} they are poor or no faces at "
            "all. Leave height and width out, and enlarge the image afterwards",
            stacklevel=2,
        )
