"""Which pixels an edit may change, and how much of each."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mogle_rt.config import VAE_SCALE
from mogle_rt.errors import InputError
from mogle_rt.masks.classes import CLASS_NAMES, Labels

LEAST_MARGIN = VAE_SCALE  # pixels: a latent covers as many, and can't change by halves
SIDES_A_MARGIN = 32  # the default margin is the shorter side divided by this, 16 pixels of 512


def class_numbers(name: str, classes: str | Sequence[str]) -> list[int]:
    """The numbers of classes that are given by their names.

    Args:
        name: of the argument, for error messages.
        classes: one name, several separated by commas, or a list of them.

    Raises:
        InputError: there is no class of a name.
    """
    names = classes.split(",") if isinstance(classes, str) else list(classes)
    numbers = []
    for one in (n.strip() if isinstance(n, str) else n for n in names):
        if one not in CLASS_NAMES:
            near = difflib.get_close_matches(str(one), CLASS_NAMES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the classes are {', '.join(CLASS_NAMES)}"
            raise InputError(f"{name}: there is no class {one!r}{hint}")
        numbers.append(CLASS_NAMES.index(one))
    return numbers


def changed_region(before: Labels, after: Labels, regions: Sequence[int]) -> NDArray[np.bool_]:
    """The pixels, [H, W], whose class is another one afterwards, or is one of ``regions`` before or afterwards."""
    wanted = np.isin(before, regions) | np.isin(after, regions)
    changed: NDArray[np.bool_] = (before != after) | wanted
    return changed


def in_both(before: Labels, after: Labels, classes: Sequence[int]) -> NDArray[np.bool_]:
    """The pixels, [H, W], that are of one of these classes before and afterwards."""
    both: NDArray[np.bool_] = np.isin(before, classes) & np.isin(after, classes)
    return both


def default_margin(height: int, width: int) -> int:
    """The margin in pixels where none is asked for: 8 up to 256 pixels, 16 at 512, 32 at 1024."""
    return max(LEAST_MARGIN, min(height, width) // SIDES_A_MARGIN)


def check_margin(margin: int, feather: int) -> None:
    """Check the widths, in pixels, by which a region is grown, and of the border in which it fades.

    Raises:
        InputError: one is no whole number of 0 or more, or ``feather`` is larger than ``margin``.
    """
    for name, value in (("margin", margin), ("feather", feather)):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 4096:
            raise InputError(f"{name} must be a whole number of pixels from 0 to 4096, got {value!r}")
    if feather > margin:
        raise InputError(f"feather can be at most the margin, {margin}, got {feather}")


def pixel_weights(region: NDArray[np.bool_], margin: int, feather: int) -> Tensor:
    """How much of each pixel is drawn anew.

    Distances are those of a chess king: the larger one of the row's and the column's.

    Args:
        region: the pixels to draw anew, [H, W].
        margin: pixels by which the region is grown on all sides.
        feather: the outermost pixels of these, in which the weights fall to 0.

    Returns:
        float32 [1, H, W]: 1 in the region and within ``margin - feather`` pixels of it, exactly 0 farther than
        ``margin`` pixels from it.
    """
    x = torch.from_numpy(region.astype(np.float32))[None, None]
    blurred = feather // 2
    grown = margin - blurred
    # A mean over squares blurs the grown region's edge, half of the way inwards and half of the way outwards.
    x = _along_both_axes(F.max_pool2d, x, grown)
    return _along_both_axes(partial(F.avg_pool2d, count_include_pad=False), x, blurred)[0]


def _along_both_axes(pool: Callable[..., Tensor], x: Tensor, radius: int) -> Tensor:
    """Pool over squares of 2 radius + 1 pixels, [1, 1, H, W] -> [1, 1, H, W], first down the rows and then across."""
    x = pool(x, (2 * radius + 1, 1), stride=1, padding=(radius, 0))
    return pool(x, (1, 2 * radius + 1), stride=1, padding=(0, radius))


def latent_weights(weights: Tensor) -> Tensor:
    """The weights of latents: the largest one of the pixels that a latent covers, [B, 1, H, W] -> [B, 1, H/8, W/8]."""
    return F.max_pool2d(weights, VAE_SCALE)
