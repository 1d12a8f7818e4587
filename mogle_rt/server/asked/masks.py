"""Masks that clients send: their files as labels, in the size of the image; and the warnings about them."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mogle_rt.errors import MaskError
from mogle_rt.masks.classes import Labels
from mogle_rt.masks.files import FORMATS, open_picture
from mogle_rt.masks.labels import from_planes, resize, to_labels
from mogle_rt.masks.planes import part_of
from mogle_rt.masks.sizes import default_size, warn_of_distortion, warn_of_other_size
from mogle_rt.server.asked.bodies import SentFile
from mogle_rt.server.asked.requests import Limits
from mogle_rt.server.refusals import Refusal

_one_at_a_time = threading.Lock()  # warnings are caught for the whole process; and decoding takes memory


def read_masks(
    files: list[SentFile], order: str, limits: Limits, field: str = "semantic_mask"
) -> tuple[Labels, list[str]]:
    """The labels of a mask, uint8 [H, W], and what the person should know about how it was read.

    Args:
        files: one, or the parts of one face, named as CelebAMask-HQ names them.
        order: what the numbers of a label map mean.
        field: its name, for refusals.

    Raises:
        Refusal: a file can't be read as a mask, or is too large.
    """
    with noted_warnings() as told:
        try:
            for file in files:
                check_size(file.data, limits.mask_pixels, "a mask")
            one = len(files) == 1
            labels = to_labels(files[0].data, order=order) if one else from_planes(_parts(files))
        except MaskError as error:
            raise Refusal(422, str(error), code="invalid_mask", param=field) from None
    return labels, told


def fitted(labels: Labels | None, size: tuple[int, int] | None, side: int) -> tuple[Labels, list[str]]:
    """Labels in the size of the image, and what the person should know about this size.

    Args:
        labels: [H, W]; None takes background alone.
        size: height and width; None takes the mask's shape.
        side: of the model's own square.
    """
    every = [] if labels is None else [labels]
    height, width = size or (default_size(every, side) if every else (side, side))
    with noted_warnings() as told:
        warn_of_distortion(every, height, width)
        warn_of_other_size(height, width, side)
    if labels is None:
        return np.zeros((height, width), dtype=np.uint8), told
    return resize(labels, height, width), told


@contextmanager
def noted_warnings() -> Iterator[list[str]]:
    """The warnings within this context, as texts. Those of pipelines that draw meanwhile are left out."""
    told: list[str] = []
    with _one_at_a_time, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for kind in (DeprecationWarning, ResourceWarning):  # these are for the authors of libraries
            warnings.simplefilter("ignore", kind)
        yield told
        told += [str(one.message) for one in caught if Path(one.filename).name != "pipeline.py"]


def check_size(data: bytes, most: int, what: str) -> None:
    """Refuse a picture that is large when decoded, by its header alone.

    Raises:
        MaskError: it has more pixels than ``most``.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        width = height = 2**20
    except Exception:  # when the picture is read, the error says what is wrong with it
        return
    if width * height > most:
        raise MaskError(f"{what} can have at most {most:,} pixels on this server, got {width} x {height}")


def _parts(files: list[SentFile]) -> dict[str, NDArray[Any]]:
    """The planes of one face's part files, by class."""
    parts: dict[str, NDArray[Any]] = {}
    faces = set()
    for file in files:
        face, name = part_of(file.name)
        faces.add(face)
        if name in parts:
            raise MaskError(f"the plane of {name} is given twice")
        parts[name] = _plane(file)
    if len(faces) > 1:
        raise MaskError(f"these are parts of {len(faces)} faces; give those of one")
    return parts


def _plane(file: SentFile) -> NDArray[Any]:
    plane = np.asarray(open_picture(io.BytesIO(file.data), file.name[:60]).convert("L"))
    return (plane > (0 if plane.max(initial=0) == 1 else 127)).astype(np.uint8)
