"""Masks with one plane for each class: merge them into class numbers, or refuse them where labels are expected."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mogle_rt.config import NUM_CLASSES
from mogle_rt.errors import MaskError
from mogle_rt.masks.classes import CLASS_NAMES, Labels
from mogle_rt.masks.files import check_pixels, open_picture
from mogle_rt.masks.orders import SHORT_NAMES, class_name

COUNTS = (NUM_CLASSES, NUM_CLASSES - 1, NUM_CLASSES + 1)
_PART_NAMES = "|".join((*CLASS_NAMES[1:], *SHORT_NAMES))
_PART_FILE = re.compile(rf"(?P<face>.+)_(?P<part>{_PART_NAMES})\.(png|jpe?g|bmp|webp|tiff?)", re.IGNORECASE)
MERGE = (
    "merge them with mogle_rt.masks.from_planes(planes), which draws later parts over earlier ones; for probabilities "
    "or logits, use from_planes(planes, scores=True)"
)


def merge(planes: NDArray[Any], table: Labels) -> Labels:
    """Merge planes that may overlap, [n, H, W] of 0 and 1 or of 0 and 255, into class numbers; see `from_planes`.

    Later parts are drawn over earlier ones in CelebAMask-HQ's own order, that of our class numbers: skin first, cloth
    last.

    Raises:
        MaskError: the number of planes doesn't match the order, or planes hold other values.
    """
    count = len(planes)
    background = int(np.argmin(table))
    if count == len(table) + 1:
        planes = planes[1:]  # the first plane is the picture of the whole mask
        classes = table
    elif count == len(table):
        classes = table
    elif count == len(table) - 1 and table[background] == 0:
        classes = np.delete(table, background)
    else:
        raise MaskError(
            f"there must be {len(table)} planes, one for each class, or {len(table) - 1} without the background's, or "
            f"{len(table) + 1} with a first one for the whole mask; got {count}"
        )
    labels = np.zeros(planes.shape[1:], dtype=np.uint8)
    for i in np.argsort(classes, kind="stable"):
        if classes[i] > 0:
            labels[is_set(planes[i], f"plane {i}")] = classes[i]
    return labels


def is_set(plane: NDArray[Any], what: str) -> NDArray[np.bool_]:
    """Where a plane [H, W] of 0 and 1, or of 0 and 255, is not 0.

    Raises:
        MaskError: the plane holds other values.
    """
    if plane.dtype == bool:
        return plane
    most = plane.max(initial=0) if plane.dtype.kind in "iuf" else None
    on: NDArray[np.bool_] = plane == most
    if most not in (0, 1, 255) or not (on | (plane == 0)).all():
        raise MaskError(
            f"{what}: must hold 0 and 1, or 0 and 255, got values of type {plane.dtype}"
            + ("" if most is None else f" from {plane.min()} to {most}")
            + "; for probabilities or logits, pass scores=True"
        )
    return on & (plane != 0)


def most_likely(scores: NDArray[Any], table: Labels) -> Labels:
    """For each pixel, the class with the largest probability or logit in [n, H, W], one plane for each class.

    Raises:
        MaskError: the number of planes is not the order's number of classes, or values aren't numbers.
    """
    if len(scores) != len(table):
        raise MaskError(
            f"scores must have a plane for each of {len(table)} classes, including the background; got {len(scores)}"
        )
    if scores.dtype.kind not in "iuf" or (scores.dtype.kind == "f" and np.isnan(scores).any()):
        raise MaskError(f"scores must be numbers and none of them NaN, got values of type {scores.dtype}")
    return table[scores.argmax(0)]


def named_planes(planes: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Stack planes [H, W], given by the names of their classes, to [19, H, W]. Planes that aren't given are empty.

    Raises:
        MaskError: no planes are given, a name is not that of a class or occurs twice, or sizes differ.
    """
    by_class: dict[int, NDArray[np.bool_]] = {}
    for name, plane in planes.items():
        c = CLASS_NAMES.index(class_name(name))
        if c in by_class:
            raise MaskError(f"the plane of {CLASS_NAMES[c]} is given twice")
        by_class[c] = is_set(plane, f"plane {name}")
    shapes = {plane.shape for plane in by_class.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        got = ", ".join(map(str, sorted(map(list, shapes)))) or "none"
        raise MaskError(f"planes must be [H, W] and of one size, got {got}")
    result = np.zeros((NUM_CLASSES, *next(iter(shapes))), dtype=bool)
    for c, one in by_class.items():
        result[c] = one
    return result


def part_files(folder: Path) -> dict[str, list[tuple[str, Path]]]:
    """Find the part files in a folder (CelebAMask-HQ's ``00000_hair.png``): by face, each part's class and file."""
    faces: dict[str, list[tuple[str, Path]]] = {}
    for path in sorted(folder.iterdir()):
        if _PART_FILE.fullmatch(path.name):
            face, part = part_of(path.name)
            faces.setdefault(face, []).append((part, path))
    return faces


def part_of(name: str) -> tuple[str, str]:
    """The face and the class that a part file's name tells.

    Raises:
        MaskError: it is not the name of a part file.
    """
    match = _PART_FILE.fullmatch(name)
    if match is None:
        raise MaskError(f"{name[:60]!r} is not the name of a part file, such as 00000_hair.png")
    return match["face"], class_name(match["part"].lower())


def from_part_files(folder: Path) -> Labels:
    """Merge one face's part files, which are black pictures with the part in white, into class numbers.

    Raises:
        MaskError: there are no part files, or those of several faces; or sizes differ, or a file can't be read.
    """
    faces = part_files(folder)
    if not faces:
        raise MaskError(
            f"{folder}: is a folder, not a mask, and holds none of CelebAMask-HQ's part files (00000_hair.png)"
        )
    if len(faces) > 1:
        some = ", ".join(list(faces)[:3]) + (", …" if len(faces) > 3 else "")
        raise MaskError(f"{folder}: holds parts of {len(faces)} faces ({some}); give each face a folder of its own")
    ((_, files),) = faces.items()
    labels: Labels | None = None
    for name, path in sorted(files, key=lambda part: CLASS_NAMES.index(part[0])):
        plane = np.asarray(open_picture(path).convert("L"))
        check_pixels(plane.shape, str(path))
        if labels is None:
            labels = np.zeros(plane.shape, dtype=np.uint8)
        if plane.shape != labels.shape:
            a, b = (f"{shape[1]} x {shape[0]}" for shape in (plane.shape, labels.shape))
            raise MaskError(f"{path}: is {a} pixels; the other parts are {b}")
        labels[plane > (0 if plane.max(initial=0) == 1 else 127)] = CLASS_NAMES.index(name)
    assert labels is not None
    return labels


def refuse_planes(array: NDArray[Any]) -> None:
    """Refuse a 3-dimensional array that holds the planes of one mask, where a batch of masks is expected.

    If it were read as a batch, each plane would be drawn as a separate mask, and the images would be meaningless.

    Raises:
        MaskError: the array seems to hold a plane for each class, or for each channel of a colour.
    """
    shape = list(array.shape)
    for axis in (0, 2):
        if shape[axis] not in COUNTS or array.dtype.kind not in "biuf" or not array.size:
            continue
        most = array.max()
        on = array == most
        if most not in (1, 255) or not (on | (array == 0)).all():
            if array.dtype.kind == "f" and not np.isin(array[:2], range(NUM_CLASSES)).all():
                raise MaskError(
                    f"a mask of shape {shape} with values between class numbers seems to hold scores; {MERGE}"
                )
            continue
        if shape[axis] == NUM_CLASSES and most == 1 and (on.sum(axis) == 1).all():
            raise MaskError(
                f"a mask of shape {shape} with one 1 at each pixel is one-hot; give its class numbers: its argmax over "
                f"dimension {axis}"
            )
        if most == 255 or array.dtype.kind in "bf" or array.dtype == np.uint8:
            raise MaskError(
                f"an array of shape {shape} and {array.dtype}, all 0 or {int(most)}, seems to hold planes of classes; "
                f"{MERGE}. If it holds {shape[0]} masks, give a list of them"
            )
    if array.dtype.kind in "iuf" and shape[0] in (3, 4) and not is_class_number(array).all():
        raise MaskError(
            f"an array of shape {shape} is {shape[0]} masks, but not all of its values are class numbers (0…18); a mask "
            "of colours must have shape [H, W, 3 or 4]"
        )


def is_class_number(numbers: NDArray[Any], count: int = NUM_CLASSES) -> NDArray[np.bool_]:
    """Whether each value is a whole number from 0 to ``count - 1``."""
    if numbers.dtype.kind == "u":
        return numbers < count
    with np.errstate(invalid="ignore"):
        right: NDArray[np.bool_] = (numbers >= 0) & (numbers < count) & (numbers == np.floor(numbers))
    return right
