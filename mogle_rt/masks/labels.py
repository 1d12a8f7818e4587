"""Semantic masks: turn them into labels of the 19 classes of CelebAMask-HQ, and labels into pictures for the VAE.

Labels are uint8 [H, W] with values 0…18.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mogle_rt.errors import MaskError
from mogle_rt.masks.classes import CLASS_NAMES, PALETTE, Labels
from mogle_rt.masks.files import (
    LOSSY,
    NPY,
    NUMBER_MODES,
    array_from,
    check_pixels,
    decoded,
    load_array,
    local_path,
    open_picture,
    transparent,
    warn_if_all_hidden,
)
from mogle_rt.masks.orders import Order, order_table, warn_of_another_order
from mogle_rt.masks.palettes import PLANE_HINT, from_colours, from_palette
from mogle_rt.masks.planes import (
    COUNTS,
    MERGE,
    from_part_files,
    is_class_number,
    merge,
    most_likely,
    named_planes,
    refuse_planes,
)
from mogle_rt.masks.smoothing import refuse_smoothed

if TYPE_CHECKING:
    from torch import Tensor

MaskLike: TypeAlias = "str | bytes | os.PathLike[str] | Image.Image | NDArray[Any] | Tensor"


def to_labels(
    mask: MaskLike, *, height: int | None = None, width: int | None = None, order: Order = "celebamask"
) -> Labels:
    """Read the labels of one mask.

    Args:
        mask: a path or PIL image (a palette PNG or grey picture of class numbers, or RGB or RGBA in the class colours),
            a folder of one face's part files as in CelebAMask-HQ, a ``.npy`` file, or an array or tensor: integer
            labels [H, W] (also [1, H, W]), or uint8 colours [H, W, 3 or 4]. docs/masks.md lists every form.
        height, width: resize the labels to this size by nearest neighbour, without blending; None keeps the mask's own.
        order: what the numbers of a label map mean: "celebamask", "bisenet", "farl", or the names of the classes from
            number 0 on. It doesn't apply to colours, which identify classes themselves.

    Returns:
        uint8 [H, W], values 0…18.

    Raises:
        MaskError: the mask can't be read, has another shape or type, or holds a number or colour that no class has.
    """
    table = order_table(order)
    if isinstance(mask, (str, os.PathLike)):
        labels = _from_path(mask, table)
    elif isinstance(mask, bytes):
        labels = _from_bytes(mask, table)
    elif isinstance(mask, Image.Image):
        labels = _from_image(decoded(mask, "mask"), table, "mask")
    elif _is_array(mask):
        labels = _from_array(_to_numpy(mask), table, "mask")
    else:
        raise MaskError(f"a mask must be a path, PIL image, array or tensor, got {type(mask).__name__}")
    own_height, own_width = labels.shape
    return resize(labels, own_height if height is None else height, own_width if width is None else width)


def to_label_batch(
    mask: MaskLike | Sequence[MaskLike],
    *,
    height: int | None = None,
    width: int | None = None,
    order: Order = "celebamask",
) -> list[Labels]:
    """Read the labels of one mask or of several.

    Args:
        mask: a mask as for `to_labels`, a list or tuple of masks, or an array or tensor [B, H, W].
        height, width, order: see `to_labels`; without a size, each mask keeps its own.

    Returns:
        One label map for each mask, uint8 [H, W].

    Raises:
        MaskError: see `to_labels`, or the list is empty. For a list, the message says which mask it was.
    """
    _check_dense(mask)
    if _is_array(mask) and mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if _is_array(mask) and (mask.ndim == 4 or (mask.ndim == 3 and not _is_colour(tuple(mask.shape)))):
        if mask.ndim == 3:
            refuse_planes(_to_numpy(mask))
        mask = list(mask)
    if not isinstance(mask, (list, tuple)):
        return [to_labels(mask, height=height, width=width, order=order)]  # type: ignore[arg-type]
    if not mask:
        raise MaskError("the list of masks is empty")
    batch = []
    for i, one in enumerate(mask):
        try:
            batch.append(to_labels(one, height=height, width=width, order=order))
        except MaskError as error:
            if isinstance(one, (str, os.PathLike)):
                raise
            raise MaskError(f"mask {i}: {str(error).removeprefix('mask: ')}") from None
    return batch


def from_planes(
    planes: NDArray[Any] | Tensor | Mapping[str, NDArray[Any] | Tensor],
    *,
    order: Order = "celebamask",
    scores: bool = False,
) -> Labels:
    """Make the labels of one mask from one plane for each class.

    Planes may overlap, as skin does with nose and eyes. Later parts are drawn over earlier ones, in CelebAMask-HQ's own
    order of parts (skin, nose, eye_glasses, … cloth), which is that of our class numbers. Pixels that no part covers
    are background.

    Args:
        planes: [19, H, W] of 0 and 1 or 0 and 255, one plane for each class of the order; [18, H, W] without the
            background's plane; [20, H, W] with an additional first plane for the whole mask, which is ignored; or
            planes [H, W] by the names of their classes. A leading dimension of 1 is removed.
        order: which class each plane belongs to, see `to_labels`.
        scores: whether the planes [19, H, W] are probabilities or logits; each pixel then gets the class with the
            largest value.

    Returns:
        uint8 [H, W], values 0…18.

    Raises:
        MaskError: the number of planes is wrong, values are not those above, or planes differ in size.
    """
    if isinstance(planes, Mapping):
        if scores:
            raise MaskError("scores come as one array [19, H, W], not by name")
        held = {n: _to_numpy(p) for n, p in planes.items()}
        return merge(named_planes(held), order_table("celebamask"))
    table = order_table(order)
    array = _to_numpy(planes)
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim != 3 or not array.size:
        raise MaskError(f"planes must be [classes, H, W], got shape {list(array.shape)}")
    check_pixels(array.shape[1:], "planes")
    return most_likely(array, table) if scores else merge(array, table)


def resize(labels: Labels, height: int, width: int) -> Labels:
    """Resize labels, uint8 [H, W] -> uint8 [height, width], by nearest neighbour of the pixel centres."""
    if labels.shape == (height, width):
        return labels
    rows = (np.arange(height) * 2 + 1) * labels.shape[0] // (2 * height)
    columns = (np.arange(width) * 2 + 1) * labels.shape[1] // (2 * width)
    return labels[rows[:, None], columns]


def colorize(labels: Labels) -> NDArray[np.uint8]:
    """Draw labels in the class colours: uint8 [H, W] -> uint8 [H, W, 3]."""
    return PALETTE[labels]


def to_image(labels: Labels) -> Image.Image:
    """Make a palette image, as data sets store masks: its pixels are class numbers, shown in class colours."""
    image = Image.fromarray(labels, mode="P")
    image.putpalette(PALETTE.flatten().tolist())
    return image


def condition_picture(labels: Labels, number: int) -> NDArray[np.uint8]:
    """One of the 20 pictures that condition an image (REFERENCE: mask -> condition tokens, step 1).

    Args:
        labels: uint8 [H, W].
        number: 0 for the mask in class colours, 1 + c for the black-and-white plane of class c.

    Returns:
        uint8 [H, W, 3].
    """
    if number == 0:
        return colorize(labels)
    plane = (labels == number - 1).astype(np.uint8) * np.uint8(255)
    return np.repeat(plane[..., None], 3, axis=-1)


def _from_path(mask: str | os.PathLike[str], table: Labels) -> Labels:
    path = local_path(mask)
    if os.path.isdir(path):
        return from_part_files(path)
    if path.suffix.lower() == ".npy":
        return _from_array(load_array(path), table, str(path))
    return _from_image(open_picture(path), table, str(path))


def _from_bytes(data: bytes, table: Labels) -> Labels:
    """Read the contents of a file, which never name another file."""
    if data.startswith(NPY):
        return _from_array(array_from(data, "mask"), table, "mask")
    return _from_image(open_picture(io.BytesIO(data), "mask"), table, "mask")


def _is_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether ``value`` is a torch tensor. Torch isn't imported here, as the command line reads masks without it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_array(value: object) -> TypeGuard[NDArray[Any] | Tensor]:
    return isinstance(value, np.ndarray) or _is_tensor(value)


def _check_dense(value: object) -> None:
    """Check that a tensor has its values in memory, one beside the other; anything else passes.

    Raises:
        MaskError: it is sparse, nested or on the meta device.
    """
    if _is_tensor(value) and (value.is_nested or value.is_meta or str(value.layout) != "torch.strided"):
        kind = "nested" if value.is_nested else "meta" if value.is_meta else "sparse"
        raise MaskError(f"a mask tensor must be dense and hold data, got a {kind} one")


def _to_numpy(value: NDArray[Any] | Tensor) -> NDArray[Any]:
    """Return an array as it is, and a tensor as an array."""
    if not _is_tensor(value):
        return np.asarray(value)
    import torch

    tensor: Tensor = value
    _check_dense(tensor)
    dense = tensor.detach().cpu().resolve_conj().resolve_neg()
    try:
        numbers: NDArray[Any] = (dense.float() if dense.dtype == torch.bfloat16 else dense).numpy()
    except TypeError:  # float8 and the like
        raise MaskError(f"a mask must hold class numbers 0…18 or colours, got values of type {dense.dtype}") from None
    return numbers


def _from_image(image: Image.Image, table: Labels, what: str) -> Labels:
    """Read the labels of an image that `decoded` has returned."""
    hidden = transparent(image, what)
    if image.mode in ("P", "PA"):
        palette = np.asarray(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)
        indices = np.asarray(image if image.mode == "P" else image.getchannel("P" if "P" in image.getbands() else 0))
        if hidden is not None and not hidden.all():  # hidden pixels must not decide which palette is recognised
            indices = np.where(hidden, indices[~hidden][0], indices)
        numbers, classes = from_palette(indices, palette, what)
    elif image.mode in NUMBER_MODES:
        numbers, classes = np.asarray(image.convert("L") if image.mode in ("1", "LA", "La") else image), None
    else:
        picture = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
        if hidden is not None:
            picture = np.where(hidden[..., None], np.uint8(0), picture)
        numbers, classes = from_colours(picture, what)
    return _classes(numbers, classes, hidden, table, what, lossy=image.format in LOSSY)


def _from_array(array: NDArray[Any], table: Labels, what: str) -> Labels:
    if array.dtype.kind not in "iuf":
        hint = f"; {MERGE}" if array.dtype == bool and array.ndim >= 3 else ""
        raise MaskError(f"a mask must hold class numbers 0…18 or colours, got values of type {array.dtype}{hint}")
    if array.ndim == 3 and array.shape[0] == 1 and not _is_colour(array.shape):
        array = array[0]
    if array.ndim == 2 and array.size:
        check_pixels(array.shape, what)
        return _classes(array, None, None, table, what)
    if array.ndim == 3 and _is_colour(array.shape) and array.size:
        if array.dtype != np.uint8:
            raise MaskError(f"a mask of colours must be uint8 (0…255), got {array.dtype}")
        check_pixels(array.shape, what)
        picture, hidden = array[..., :3], None
        if array.shape[2] == 4:
            hidden = warn_if_all_hidden(array[..., 3] == 0, what)
            if hidden is not None:
                picture = np.where(hidden[..., None], np.uint8(0), picture)
        return _classes(*from_colours(picture, what), hidden, table, what)
    planes = array.ndim in (3, 4) and any(n in COUNTS for n in array.shape)
    raise MaskError(
        f"a mask array must be [H, W] of labels or [H, W, 3 or 4] of colours, got shape {list(array.shape)}"
        + (f"; of planes for each class, {MERGE}" if planes else "")
    )


def _is_colour(shape: tuple[int, ...]) -> bool:
    return len(shape) >= 3 and shape[-1] in (3, 4)


def _classes(
    numbers: NDArray[Any],
    classes: Labels | None,
    hidden: NDArray[np.bool_] | None,
    table: Labels,
    what: str,
    *,
    lossy: bool = False,
) -> Labels:
    """Turn numbers [H, W] in an order into classes. If colours gave ``classes`` already, only the hidden pixels change.

    Hidden pixels become background.

    Raises:
        MaskError: a number is not that of a class, or numbers were changed by resizing or by JPEG.
    """
    if classes is not None:
        labels = classes
        given = labels
    else:
        if hidden is not None:
            numbers = np.where(hidden, 0, numbers)
        right = is_class_number(numbers, len(table))
        if not right.all():
            y, x = divmod(int(right.argmin()), right.shape[1])
            raise MaskError(
                f"{what}: pixel (x={x}, y={y}) holds {numbers[y, x]}, which is not a class number; classes are "
                f"0 ({CLASS_NAMES[table[0]]}) to {len(table) - 1} ({CLASS_NAMES[table[-1]]})"
                + (PLANE_HINT if np.isin(numbers, (0, 255)).all() else "")
            )
        given = numbers.astype(np.uint8)
        if lossy and given.min() != given.max():
            raise MaskError(f"{what}: JPEG changes class numbers; save them as PNG, or a picture in the class colours")
        refuse_smoothed(given, what)
        labels = table[given]
    if hidden is not None:
        labels = np.where(hidden, np.uint8(0), labels)
    if classes is None:
        warn_of_another_order(given, table, what)
    else:
        warn_of_another_order(labels, order_table("celebamask"), what, coloured=True)
    return labels
