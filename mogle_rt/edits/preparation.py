"""What an edit starts from: its images and masks paired up, and the pixels that are drawn anew."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mogle_rt.arguments import refuse_prompt_as_mask
from mogle_rt.edits.images import ImageLike, to_pixels
from mogle_rt.edits.regions import (
    changed_region,
    check_margin,
    class_numbers,
    default_margin,
    in_both,
    pixel_weights,
)
from mogle_rt.edits.start import StartImage
from mogle_rt.errors import InputError
from mogle_rt.masks.classes import CLASS_NAMES, Labels
from mogle_rt.masks.labels import MaskLike, resize, to_label_batch
from mogle_rt.masks.orders import Order
from mogle_rt.masks.sizes import warn_of_distortion

AreaLike: TypeAlias = "NDArray[Any] | Tensor"
T = TypeVar("T")


def start_of_edit(
    image: ImageLike | Sequence[ImageLike],
    mask_before: MaskLike | Sequence[MaskLike],
    mask_after: MaskLike | Sequence[MaskLike],
    strength: float,
    *,
    keep: str | Sequence[str] = (),
    regions: str | Sequence[str] = (),
    area: AreaLike | Sequence[AreaLike] | None = None,
    margin: int | None = None,
    feather: int | None = None,
    mask_order: Order = "celebamask",
) -> tuple[StartImage, list[Labels]]:
    """Prepare what `EditMethods.edit` starts from; it describes the arguments.

    Returns:
        The images with the weights of their pixels, and the masks of the results, n label maps [H, W].

    Raises:
        InputError, MaskError: see `EditMethods.edit`.
    """
    pixels, before, after = _paired(to_pixels(image), mask_before, mask_after, mask_order)
    height, width = pixels.shape[2:]
    margin = default_margin(height, width) if margin is None else margin
    feather = margin // 2 if feather is None else feather
    check_margin(margin, feather)
    anew, kept = class_numbers("regions", regions), class_numbers("keep", keep)
    areas = _areas(area, len(pixels), height, width)
    weights = []
    for old, new, further in zip(before, after, areas, strict=True):
        weight = pixel_weights(changed_region(old, new, anew) | further, margin, feather)
        weights.append(weight * torch.from_numpy(~in_both(old, new, kept)))
    start = StartImage(pixels=pixels, strength=strength, weights=torch.stack(weights))
    if start.keeps_all:
        named = f"no pixel is of {', '.join(CLASS_NAMES[c] for c in anew)}" if anew else "the two masks are equal"
        what = named if area is None else f"{named} and no pixel is in the area"
        warnings.warn(
            f"nothing is drawn anew, because {what}; name other regions, or use image_to_image to change everything",
            stacklevel=3,
        )
    return start, after


def start_of_image(
    image: ImageLike | Sequence[ImageLike],
    mask: MaskLike | Sequence[MaskLike] | None,
    strength: float,
    *,
    mask_order: Order = "celebamask",
) -> tuple[StartImage, list[Labels]]:
    """Prepare what `EditMethods.image_to_image` starts from; it describes the arguments.

    Returns:
        The images, and the masks of the results, n label maps [H, W].

    Raises:
        InputError, MaskError: see `EditMethods.edit`.
    """
    pixels = to_pixels(image)
    if mask is None:
        mask = np.zeros(pixels.shape[2:], dtype=np.uint8)
    pixels, labels, _ = _paired(pixels, mask, mask, mask_order)
    return StartImage(pixels=pixels, strength=strength), labels


def _areas(area: AreaLike | Sequence[AreaLike] | None, count: int, height: int, width: int) -> list[NDArray[np.bool_]]:
    """One area [H, W] for each image."""
    given = list(area) if isinstance(area, (list, tuple)) else [area]
    areas = []
    for one in given:
        if one is None:
            areas.append(np.zeros((height, width), dtype=np.bool_))
            continue
        values = one.detach().cpu().numpy() if isinstance(one, Tensor) else np.asarray(one)
        if values.shape != (height, width) or values.dtype.kind not in "biuf":
            raise InputError(
                f"area must be an array of the image's size, [{height}, {width}], not 0 where pixels are drawn anew; got "
                f"{values.dtype} of shape {list(values.shape)}"
            )
        areas.append(values != 0)
    if len(areas) not in (1, count):
        raise InputError(f"give one area, or one for each image: got {len(areas)} for {count} images")
    return _repeated(areas, count)


def _paired(
    pixels: Tensor,
    mask_before: MaskLike | Sequence[MaskLike],
    mask_after: MaskLike | Sequence[MaskLike],
    order: Order,
) -> tuple[Tensor, list[Labels], list[Labels]]:
    """n images and their masks, all of one size: pixels [n, 3, H, W], and n label maps [H, W] of each kind."""
    refuse_prompt_as_mask(mask_before)
    refuse_prompt_as_mask(mask_after)
    height, width = pixels.shape[2:]
    every = [to_label_batch(mask, order=order) for mask in (mask_before, mask_after)]
    counts = {"images": len(pixels), "masks before": len(every[0]), "masks after": len(every[1])}
    count = max(counts.values())
    if not set(counts.values()) <= {1, count}:
        told = ", ".join(f"{number} {name}" for name, number in counts.items())
        raise InputError(f"images and masks don't pair up: give one of each, or the same number of them; got {told}")
    for labels in every:
        warn_of_distortion(labels, height, width)
    before, after = (_repeated([resize(one, height, width) for one in labels], count) for labels in every)
    return pixels.expand(count, -1, -1, -1), before, after


def _repeated(values: list[T], count: int) -> list[T]:
    return values if len(values) == count else values * count
