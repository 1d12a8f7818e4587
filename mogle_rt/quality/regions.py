"""Whether the regions of an image are those of its mask, by the labels that a face parser finds in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mogle_rt.config import NUM_CLASSES
from mogle_rt.masks.classes import Labels

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Overlap:
    """How many pixels of each class agree, in each of n images; all int64 [n, 19].

    Attributes:
        shared: those that have the class in the image and in the mask.
        found: those that have it in the image. wanted: those that have it in the mask.
    """

    shared: NDArray[np.int64]
    found: NDArray[np.int64]
    wanted: NDArray[np.int64]

    @classmethod
    def of(cls, found: Sequence[Labels] | Labels, wanted: Sequence[Labels] | Labels) -> Overlap:
        """Count the classes of labels [n, H, W], or of n label maps, each as large as the one that it is compared with."""
        tables = []
        for a, b in zip(found, wanted, strict=True):
            pairs = b.astype(np.int64) * NUM_CLASSES + a
            tables.append(np.bincount(pairs.ravel(), minlength=NUM_CLASSES**2).reshape(NUM_CLASSES, NUM_CLASSES))
        table = np.stack(tables)
        return cls(table.diagonal(axis1=1, axis2=2).copy(), table.sum(1), table.sum(2))

    @classmethod
    def joined(cls, parts: Sequence[Overlap]) -> Overlap:
        """Those of several sets of images as one."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("shared", "found", "wanted")))

    def iou_of_classes(self, weights: NDArray[np.int64] | None = None) -> Floats:
        """Intersection over union of each class, over all images together: [19], NaN where no mask has the class.

        Args:
            weights: how many times each image counts, [n], or [B, n] for B figures [B, 19] at once; None counts each once.
        """
        one = np.ones(len(self.shared), np.int64) if weights is None else weights
        shared, found, wanted = (one @ counts for counts in (self.shared, self.found, self.wanted))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.where(wanted > 0, shared / (found + wanted - shared), np.nan))

    def iou_of_images(self) -> Floats:
        """The mean intersection over union of the classes that each image's mask has, [n]."""
        with np.errstate(invalid="ignore", divide="ignore"):
            each = np.where(self.wanted > 0, self.shared / (self.found + self.wanted - self.shared), np.nan)
        return np.asarray(np.nanmean(each, 1))

    def accuracy_of_images(self) -> Floats:
        """The share of each image's pixels that have the class of its mask, [n]."""
        return np.asarray(self.shared.sum(1) / self.wanted.sum(1))


def iou(found: Labels, wanted: Labels) -> dict[int, float]:
    """Intersection over union of each class that occurs in ``wanted``, over all pictures [n, H, W] together."""
    values = Overlap.of(found, wanted).iou_of_classes()
    return {c: float(value) for c, value in enumerate(values) if not np.isnan(value)}


def face_like(labels: Labels) -> bool:
    """Whether there are skin, eyes (or glasses), nose and mouth, with the eyes above the nose and that above the mouth."""

    def height(*classes: int) -> float | None:
        rows = np.nonzero(np.isin(labels, classes))[0]
        return float(rows.mean()) if len(rows) >= 4 else None

    skin = float((labels == 1).mean())
    eyes, nose, mouth = height(3, 4, 5), height(2), height(10, 11, 12)
    if not 0.05 < skin < 0.6 or eyes is None or nose is None or mouth is None:
        return False
    return eyes < nose < mouth
