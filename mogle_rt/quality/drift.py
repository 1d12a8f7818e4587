"""How far images lie from others that should be the same: what an approximation, or an edit, changes."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mogle_rt.config import NUM_CLASSES
from mogle_rt.masks.classes import Labels
from mogle_rt.quality.pictures import Picture, Pictures

LEAST_ERROR = (
    1e-12  # the least mean square of an error, of pixels from 0 to 1: equal pictures have 120 dB, not infinity
)
LEAST_PIXELS = 40  # that a region must have for its mean colour to be compared
Floats = NDArray[np.float64]


def psnr(images: Pictures, others: Pictures) -> Floats:
    """The peak signal-to-noise ratio of each pair of pictures, [n] in dB, at most 120."""
    error = ((images.astype(float) - others) ** 2).mean((1, 2, 3))
    return np.asarray(10 * np.log10(255**2 / np.maximum(error, LEAST_ERROR * 255**2)))


def psnr_outside(image: Picture, other: Picture, region: NDArray[np.bool_]) -> float:
    """The peak signal-to-noise ratio of two pictures outside of a region [H, W], in dB."""
    error = ((image[~region].astype(float) - other[~region]) / 255) ** 2
    return float(-10 * np.log10(error.mean() + LEAST_ERROR))


def ssim(images: Pictures, others: Pictures) -> Floats:
    """The structural similarity of each pair of pictures, [n], 1 if they are equal (Wang et al. 2004; by torchmetrics)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = (torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).double() / 255 for x in (images, others))
    return structural_similarity_index_measure(a, b, data_range=1.0, reduction="none").reshape(len(a)).numpy()


def rms_difference(images: NDArray[np.generic], others: NDArray[np.generic]) -> float:
    """The root of the mean square of all differences of two arrays of pictures, in their own unit."""
    return float(np.sqrt(((images.astype(float) - others.astype(float)) ** 2).mean()))


def latents_error(latents: Tensor, exact: Tensor) -> float:
    """The distance of latents [n, ...] from exact ones, relative to their length; of n, the root of the mean square."""
    away = (latents - exact).double().flatten(1).norm(dim=1) / exact.double().flatten(1).norm(dim=1)
    return float(away.square().mean().sqrt())


def colour_shift(images: Pictures, others: Pictures, labels: Labels) -> float:
    """The largest shift of a region's mean colour, of 255, over all pairs of pictures, classes and channels.

    Args:
        images, others: uint8 [n, H, W, 3]. labels: their masks, [n, H, W].
    """
    shifts = [
        np.abs(a[where].mean(0) - b[where].mean(0)).max()
        for a, b, label in zip(images.astype(float), others.astype(float), labels, strict=True)
        for where in (label == number for number in range(NUM_CLASSES))
        if where.sum() >= LEAST_PIXELS
    ]
    return float(max(shifts, default=0.0))
