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
from mogle_rt.masks.borders import TOLERANCE, _distances, _settle_borders
from mogle_rt.masks.classes import CLASS_NAMES, PALETTE, Labels

MaskLike: TypeAlias = str | os.PathLike[str] | Image.Image | NDArray[Any] | Tensor


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
        labels = _from_array(_to_numpy(mask) if isinstance(mask, Tensor) else mask)
    else:
        raise MaskError(f"a mask must be a path, PIL image, array or tensor, got {type(mask).__name__}")
    own_height, own_width = labels.shape
    return resize(labels, own_height if height is None else height, own_width if width is None else width)


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
        if mask.ndim == 3:
            _refuse_planes(_to_numpy(mask) if isinstance(mask, Tensor) else mask)
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
            raise MaskError(f"mask {i}: {str(error).removeprefix('mask: ')}") from None
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


def condition_picture(labels: Labels, number: int) -> NDArray[np.uint8]:
    """One of the 20 pictures that condition an image (REFERENCE: mask -> condition tokens, step 1).

    Args:
        number: 0 for the mask in class colours, 1 + c for the black-and-white plane of class c.

    Returns:
        uint8 [H, W, 3].
    """
    if number == 0:
        return colorize(labels)
    plane = (labels == number - 1).astype(np.uint8) * np.uint8(255)
    return np.repeat(plane[..., None], 3, axis=-1)


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


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "meta" if tensor.is_meta else "sparse"
        raise MaskError(f"a mask tensor must be dense and hold data, got a {kind} one")
    dense = tensor.detach().cpu()
    try:
        numbers: NDArray[Any] = (dense.float() if dense.dtype == torch.bfloat16 else dense).numpy()
    except TypeError:  # float8 and the like
        raise MaskError(f"a mask must hold class numbers 0…18 or colours, got values of type {dense.dtype}") from None
    return numbers


def _from_image(image: Image.Image, what: str) -> Labels:
    try:
        image.load()  # an image that was opened but not read yet
    except (OSError, ValueError, SyntaxError) as error:
        raise MaskError(f"{what}: can't be read: {error}") from None
    if 0 in image.size:
        raise MaskError(f"{what}: a picture of {image.width} x {image.height} pixels holds no mask")
    if image.mode == "P":
        return _from_palette(image, what)
    if image.mode in ("1", "L", "LA", "La"):
        return _from_numbers(np.asarray(image.convert("L")), what)
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        return _from_numbers(np.asarray(image), what)
    return _from_colours(np.asarray(image.convert("RGB")), what)


def _from_palette(image: Image.Image, what: str) -> Labels:
    """Pixels of a palette image are class numbers, unless its palette holds the class colours in another order, or greys
    that are class numbers themselves, as when a grey picture is saved as GIF."""
    indices = np.asarray(image)
    used = np.unique(indices)
    palette = np.asarray(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)
    if used.max(initial=0) < len(palette) and palette.any():
        colours = palette[used]
        distances = ((colours[:, None].astype(np.int32) - PALETTE.astype(np.int32)) ** 2).sum(-1)
        greys = (colours == colours[:, :1]).all() and 0 < colours.max() < NUM_CLASSES
        if greys or (distances.min(-1) == 0).all():
            table = np.zeros(256, dtype=np.uint8)
            table[used] = colours[:, 0] if greys else distances.argmin(-1)
            return table[indices]
    return _from_numbers(indices, what)


def _from_array(array: NDArray[Any]) -> Labels:
    if array.dtype.kind not in "iuf":
        raise MaskError(f"a mask must hold class numbers 0…18 or colours, got values of type {array.dtype}")
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


def _refuse_planes(array: NDArray[Any]) -> None:
    """Three dimensions are a batch of masks. One mask in other clothes would be taken for one, and drawn as nonsense.

    Raises:
        MaskError: it is a plane for each class (one-hot), or, it seems, for each channel of a colour.
    """
    shape = list(array.shape)
    for axis in (0, 2):
        if shape[axis] != NUM_CLASSES:
            continue
        hot = array == 1
        if (hot | (array == 0)).all() and (hot.sum(axis) == 1).all():
            raise MaskError(
                f"a mask of shape {shape} with one 1 in each place is one-hot; give its class numbers: its argmax over "
                f"dimension {axis}"
            )
    if array.dtype.kind in "iuf" and shape[0] in (3, 4) and _not_classes(array).any():
        raise MaskError(
            f"an array of shape {shape} is {shape[0]} masks, but not all of its values are class numbers (0…18); a mask "
            "of colours must have shape [H, W, 3 or 4]"
        )


def _not_classes(numbers: NDArray[Any]) -> NDArray[np.bool_]:
    with np.errstate(invalid="ignore"):
        wrong: NDArray[np.bool_] = ~((numbers >= 0) & (numbers < NUM_CLASSES)) | (numbers != np.floor(numbers))
    return wrong


def _from_numbers(numbers: NDArray[Any], what: str) -> Labels:
    wrong = _not_classes(numbers)
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
    codes = picture.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
    codes, inverse = np.unique(codes, return_inverse=True)
    distance = _distances(np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=-1))
    inverse = inverse.reshape(picture.shape[:2])
    labels = distance.argmin(-1).astype(np.uint8)[inverse]
    sure = (distance.min(-1) <= TOLERANCE)[inverse]
    if not sure.all():
        _settle_borders(labels, sure, picture, what)
    return labels
