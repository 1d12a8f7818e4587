"""Semantic masks: read them in any common form, as labels of the 19 classes of CelebAMask-HQ."""

from mogle_rt.masks.borders import TOLERANCE
from mogle_rt.masks.classes import CLASS_NAMES, PALETTE, Labels
from mogle_rt.masks.labels import (
    MaskLike,
    colorize,
    condition_picture,
    from_planes,
    resize,
    to_image,
    to_label_batch,
    to_labels,
)
from mogle_rt.masks.orders import ORDERS, Order

__all__ = [
    "CLASS_NAMES",
    "ORDERS",
    "PALETTE",
    "TOLERANCE",
    "Labels",
    "MaskLike",
    "Order",
    "colorize",
    "condition_picture",
    "from_planes",
    "resize",
    "to_image",
    "to_label_batch",
    "to_labels",
]
