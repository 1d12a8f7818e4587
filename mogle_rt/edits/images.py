"""Read the images that an edit starts from, in every form in which the pipeline returns images."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from mogle_rt.config import PATCH
from mogle_rt.errors import InputError
from mogle_rt.masks.files import FORMATS, MAX_PIXELS, decodable

ImageLike: TypeAlias = "str | bytes | os.PathLike[str] | Image.Image | NDArray[Any] | Tensor"

NUMBERS = ("1", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")  # modes of pictures that are no photographs


def to_pixels(image: ImageLike | Sequence[ImageLike]) -> Tensor:
    """Read images as one tensor.

    Args:
        image: a path, a file's contents as bytes, a PIL image, an array [H, W, 3] or [B, H, W, 3], a tensor [3, H, W]
            or [B, 3, H, W], or a list of these. Arrays and tensors hold uint8, or floating point values in [0, 1].

    Returns:
        float32 [B, 3, H, W] in [0, 1], on the CPU. The 256 values of a byte b are b / 255.

    Raises:
        InputError: an image can't be read, has transparent pixels, or has another shape or type; a side is no multiple
            of 16; or images differ in size.
    """
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    if not images:
        raise InputError("the list of images is empty")
    read = [_pixels(one, "image" if len(images) == 1 else f"image {i}") for i, one in enumerate(images)]
    sizes = [(one.shape[3], one.shape[2]) for one in read]
    for width, height in sizes:
        if width % PATCH or height % PATCH:
            near = " x ".join(str(max(PATCH, round(side / PATCH) * PATCH)) for side in (width, height))
            raise InputError(
                f"the image is {width} x {height} pixels, width by height; both must be multiples of {PATCH}: crop or "
                f"resize it, for example to {near}"
            )
        if (width, height) != sizes[0]:
            raise InputError(
                f"images of one call must have the same size, got {sizes[0][0]} x {sizes[0][1]} and {width} x {height}"
            )
    return torch.cat(read)


def _pixels(image: object, what: str) -> Tensor:
    """One image, or a batch of them in one array: float32 [B, 3, H, W]."""
    if isinstance(image, bytes):
        return _from_file(io.BytesIO(image), what)
    if isinstance(image, (str, os.PathLike)):
        name = os.path.expanduser(os.fsdecode(image))
        return _from_file(name, name)
    if isinstance(image, Image.Image):
        return _from_picture(image, what)
    if isinstance(image, np.ndarray) and image.ndim in (3, 4) and image.shape[-1] == 3:
        channels_first = np.moveaxis(image, -1, -3)
        return _from_values(torch.from_numpy(np.ascontiguousarray(channels_first)), what)
    if isinstance(image, Tensor) and image.ndim in (3, 4) and image.shape[-3] == 3:
        return _from_values(image.detach(), what)
    got = f"shape {list(image.shape)}" if isinstance(image, (np.ndarray, Tensor)) else type(image).__name__
    raise InputError(
        f"{what} must be a path, a PIL image, an array [H, W, 3] or a tensor [3, H, W], or several of one size as "
        f"[B, H, W, 3] or [B, 3, H, W]; got {got}"
    )


def _from_values(values: Tensor, what: str) -> Tensor:
    check_size(values.shape[-1], values.shape[-2], what)
    if values.dtype == torch.uint8:
        pixels = values.cpu().float() / 255
    elif values.is_floating_point():
        pixels = values.cpu().float()
    else:
        raise InputError(f"{what} must hold uint8 or floating point values, got {values.dtype}")
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise InputError(f"{what} must hold values from 0 to 1 where they are floating point, or uint8 from 0 to 255")
    return pixels if pixels.ndim == 4 else pixels[None]


def _from_file(source: str | BinaryIO, name: str) -> Tensor:
    with decodable(name, "an image", InputError), Image.open(source, formats=FORMATS) as image:
        return _from_picture(image, name)


def _from_picture(image: Image.Image, what: str) -> Tensor:
    check_size(image.width, image.height, what)
    with decodable(what, "an image", InputError):
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            alpha = upright.convert("RGBA").getchannel("A").getextrema()[0]
            if alpha != 255:
                raise InputError(f"{what}: has transparent pixels; an edit needs an image that is opaque everywhere")
        colours = upright.convert("RGB")
    if image.mode in NUMBERS:
        raise InputError(f"{what}: must be a picture of 8 bits a channel, got one of mode {image.mode}")
    return _from_values(torch.from_numpy(np.array(colours)).permute(2, 0, 1), what)


def check_size(width: int, height: int, what: str) -> None:
    """Refuse an image that is empty or too large, before it is decoded.

    Raises:
        InputError: it has no pixels, or more than `mogle_rt.masks.files.MAX_PIXELS`.
    """
    if not 0 < width * height <= MAX_PIXELS:
        raise InputError(f"{what}: an image can have 1 to {MAX_PIXELS:,} pixels, got {width} x {height}")
