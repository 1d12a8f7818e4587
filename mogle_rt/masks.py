"""Semantic masks: whatever a person holds -> labels of the 19 CelebAMask-HQ classes -> pictures for the VAE.

The only copy of this logic. Labels are uint8 [H, W] with values 0…18.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mogle_rt.config import NUM_CLASSES
from mogle_rt.errors import MaskError

CLASS_NAMES = (
    "background",
    "skin",
    "nose",
    "eye_glasses",
    "l_eye",
    "r_eye",
    "l_brow",
    "r_brow",
    "l_ear",
    "r_ear",
    "mouth",
    "u_lip",
    "l_lip",
    "hair",
    "hat",
    "ear_ring",
    "necklace",
    "neck",
    "cloth",
)

PALETTE: NDArray[np.uint8] = np.array(
    [
        (0, 0, 0),
        (204, 0, 0),
        (76, 153, 0),
        (204, 204, 0),
        (51, 51, 255),
        (204, 0, 204),
        (0, 255, 255),
        (255, 204, 204),
        (102, 51, 0),
        (255, 0, 0),
        (102, 204, 0),
        (255, 255, 0),
        (0, 0, 153),
        (0, 0, 204),
        (255, 51, 153),
        (0, 204, 204),
        (0, 51, 0),
        (255, 153, 51),
        (0, 204, 0),
    ],
    dtype=np.uint8,
)

TOLERANCE = 25.0
"""Largest distance in RGB at which a colour counts as its nearest class: just under half of the least distance of two
class colours (51), so the nearest is never in doubt."""

BORDER = 16
"""JPEG and smooth resizing blend and ring around borders, within a JPEG block of 16 pixels. Within this many pixels of
two or more classes, a colour beyond the tolerance becomes the nearest of *those* classes; elsewhere it is an error."""

MaskLike: TypeAlias = str | os.PathLike[str] | Image.Image | NDArray[Any] | Tensor
Labels: TypeAlias = NDArray[np.uint8]


def to_labels(mask: MaskLike, *, height: int | None = None, width: int | None = None) -> Labels:
    """Labels of one mask.

    Args:
        mask: a path or PIL image (palette PNG or grey picture of class numbers, RGB or RGBA in the class colours), or
            an array or tensor: integer labels [H, W] (also [1, H, W]), or colours [H, W, 3 or 4] of uint8.
        height, width: resize to this by nearest neighbour, never blended; None keeps the mask's own.

    Returns:
        uint8 [H, W], values 0…18.

    Raises:
        MaskError: unreadable, of another shape or type, a class number above 18, or a colour that is no class's.
    """
    if isinstance(mask, (str, os.PathLike)):
        labels = _from_image(_open(Path(mask)), str(mask))
    elif isinstance(mask, Image.Image):
        labels = _from_image(mask, "mask")
    elif isinstance(mask, (np.ndarray, Tensor)):
        labels = _from_array(mask.detach().cpu().numpy() if isinstance(mask, Tensor) else mask)
    else:
        raise MaskError(f"a mask must be a path, PIL image, array or tensor, got {type(mask).__name__}")
    if height is None or width is None:
        return labels
    return resize(labels, height, width)


def to_label_batch(mask: MaskLike | Sequence[MaskLike], *, height: int, width: int) -> list[Labels]:
    """Labels of one mask or of several: a list or tuple, or an array or tensor [B, H, W].

    Raises:
        MaskError: see `to_labels`; an empty list; in a list, the message says which mask it was.
    """
    if isinstance(mask, (np.ndarray, Tensor)) and mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if isinstance(mask, (np.ndarray, Tensor)) and (
        mask.ndim == 4 or (mask.ndim == 3 and not _is_colour(tuple(mask.shape)))
    ):
        mask = list(mask)
    if not isinstance(mask, (list, tuple)):
        return [to_labels(mask, height=height, width=width)]  # type: ignore[arg-type]
    if not mask:
        raise MaskError("the list of masks is empty")
    batch = []
    for i, one in enumerate(mask):
        try:
            batch.append(to_labels(one, height=height, width=width))
        except MaskError as error:
            if isinstance(one, (str, os.PathLike)):
                raise
            raise MaskError(f"mask {i}: {error}") from None
    return batch


def resize(labels: Labels, height: int, width: int) -> Labels:
    """Nearest neighbour (pixel centres)."""
    if labels.shape == (height, width):
        return labels
    rows = (np.arange(height) * 2 + 1) * labels.shape[0] // (2 * height)
    columns = (np.arange(width) * 2 + 1) * labels.shape[1] // (2 * width)
    return labels[rows[:, None], columns]


def colorize(labels: Labels) -> NDArray[np.uint8]:
    """The picture in class colours: uint8 [H, W] -> uint8 [H, W, 3]."""
    return PALETTE[labels]


def to_image(labels: Labels) -> Image.Image:
    """A palette image, as the data sets store it: pixels are class numbers, shown in class colours."""
    image = Image.fromarray(labels, mode="P")
    image.putpalette(PALETTE.flatten().tolist())
    return image


def region_planes(labels: Labels) -> Tensor:
    """The 20 pictures that condition an image (REFERENCE: mask -> condition tokens, step 1).

    Returns:
        uint8 [20, H, W, 3]: the palette picture, then the black-and-white plane of each class.
    """
    planes = np.zeros((1 + NUM_CLASSES, *labels.shape, 3), dtype=np.uint8)
    planes[0] = PALETTE[labels]
    for c in range(NUM_CLASSES):
        planes[1 + c][labels == c] = 255
    return torch.from_numpy(planes)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise MaskError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise MaskError(f"{path}: is a folder, not a mask") from None
    except (UnidentifiedImageError, Image.DecompressionBombError):
        raise MaskError(f"{path}: not a picture that can be read") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise MaskError(f"{path}: can't be read: {error}") from None


def _from_image(image: Image.Image, what: str) -> Labels:
    if image.mode == "P":
        return _from_palette(image, what)
    if image.mode in ("1", "L", "LA", "La"):
        return _from_numbers(np.asarray(image.convert("L")), what)
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        return _from_numbers(np.asarray(image), what)
    return _from_colours(np.asarray(image.convert("RGB")), what)


def _from_palette(image: Image.Image, what: str) -> Labels:
    """Pixels of a palette image are class numbers, unless its palette holds the class colours in another order."""
    indices = np.asarray(image)
    used = np.unique(indices)
    palette = np.asarray(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)
    if used.max(initial=0) < len(palette) and palette[used].any():
        colours = palette[used]
        distances = ((colours[:, None].astype(np.int32) - PALETTE.astype(np.int32)) ** 2).sum(-1)
        if (distances.min(-1) == 0).all():
            table = np.zeros(256, dtype=np.uint8)
            table[used] = distances.argmin(-1)
            return table[indices]
    return _from_numbers(indices, what)


def _from_array(array: NDArray[Any]) -> Labels:
    if array.dtype == bool:
        raise MaskError("a mask must hold class numbers 0…18 or colours, got booleans")
    if array.ndim == 3 and array.shape[0] == 1 and not _is_colour(array.shape):
        array = array[0]
    if array.ndim == 2 and array.size:
        return _from_numbers(array, "mask")
    if array.ndim == 3 and _is_colour(array.shape) and array.size:
        if array.dtype != np.uint8:
            raise MaskError(f"a mask of colours must be uint8 (0…255), got {array.dtype}")
        return _from_colours(array[..., :3], "mask")
    raise MaskError(
        f"a mask array must be [H, W] of labels or [H, W, 3 or 4] of colours, got shape {list(array.shape)}"
    )


def _is_colour(shape: tuple[int, ...]) -> bool:
    return len(shape) >= 3 and shape[-1] in (3, 4)


def _from_numbers(numbers: NDArray[Any], what: str) -> Labels:
    with np.errstate(invalid="ignore"):
        wrong = ~((numbers >= 0) & (numbers < NUM_CLASSES)) | (numbers != np.floor(numbers))
    if wrong.any():
        y, x = np.argwhere(wrong)[0]
        raise MaskError(
            f"{what}: pixel (x={x}, y={y}) holds {numbers[y, x]}, which is not a class number; "
            f"classes are 0 ({CLASS_NAMES[0]}) to {NUM_CLASSES - 1} ({CLASS_NAMES[-1]})"
        )
    return numbers.astype(np.uint8)


def _from_colours(picture: NDArray[np.uint8], what: str) -> Labels:
    grey = (picture == picture[..., :1]).all()
    if grey and 0 < picture.max() < NUM_CLASSES:
        return picture[..., 0].copy()  # class numbers, saved with three equal channels
    flat = picture.reshape(-1, 3)
    colours, inverse = np.unique(
        flat.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32), return_inverse=True
    )
    channels = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=-1).astype(np.int32)
    distance = np.sqrt(((channels[:, None] - PALETTE.astype(np.int32)) ** 2).sum(-1))  # [colours, 19]
    labels = distance.argmin(-1).astype(np.uint8)[inverse].reshape(picture.shape[:2])
    sure = (distance.min(-1) <= TOLERANCE)[inverse].reshape(picture.shape[:2])
    if not sure.all():
        _settle_borders(labels, sure, distance[inverse].reshape(*picture.shape[:2], NUM_CLASSES), picture, what)
    return labels


def _settle_borders(
    labels: Labels, sure: NDArray[np.bool_], distance: NDArray[np.float64], picture: NDArray[np.uint8], what: str
) -> None:
    """Give unsure pixels near a border the nearest class of that border, in place.

    Raises:
        MaskError: a pixel that isn't near a border has a colour that is no class's.
    """
    near = np.zeros((NUM_CLASSES, *labels.shape), dtype=bool)
    for c in np.unique(labels[sure]):
        near[c] = _grow((labels == c) & sure)
    unsure = np.argwhere(~sure)
    candidates = near[:, unsure[:, 0], unsure[:, 1]].T  # [pixels, 19]
    distances = np.where(candidates, distance[unsure[:, 0], unsure[:, 1]], np.inf)
    foreign = candidates.sum(-1) < 2
    if foreign.any():
        y, x = unsure[foreign][0]
        colour = tuple(int(v) for v in picture[y, x])
        nearest = int(distance[y, x].argmin())
        raise MaskError(
            f"{what}: pixel (x={x}, y={y}) has colour {colour}, which is no class's; the nearest is "
            f"{CLASS_NAMES[nearest]} {tuple(int(v) for v in PALETTE[nearest])}, "
            f"{distance[y, x, nearest]:.0f} away (tolerance {TOLERANCE:.0f})"
        )
    labels[unsure[:, 0], unsure[:, 1]] = distances.argmin(-1).astype(np.uint8)


def _grow(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Every pixel within `BORDER` pixels of the region, in rows and columns."""
    for axis in (0, 1):
        grown = region.copy()
        for step in range(1, BORDER + 1):
            ahead = [slice(None), slice(None)]
            behind = [slice(None), slice(None)]
            ahead[axis], behind[axis] = slice(step, None), slice(None, -step)
            grown[tuple(ahead)] |= region[tuple(behind)]
            grown[tuple(behind)] |= region[tuple(ahead)]
        region = grown
    return region
