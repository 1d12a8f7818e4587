"""Images as judges take them: eight bits, RGB, and resized without the aliasing that would change the measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mogle_rt.errors import InputError, MaskError
from mogle_rt.masks.files import open_picture

Picture: TypeAlias = NDArray[np.uint8]  # [H, W, 3], RGB
Pictures: TypeAlias = NDArray[np.uint8]  # [n, H, W, 3]


def read_picture(path: Path) -> Picture:
    """An image file as uint8 [H, W, 3], RGB.

    Raises:
        InputError: there is no such file, or it can't be read as an image.
    """
    try:
        return np.asarray(open_picture(path).convert("RGB"))
    except MaskError as error:
        raise InputError(str(error)) from None


def resized(picture: Picture, height: int, width: int) -> NDArray[np.float32]:
    """A picture at another size, float32 [height, width, 3] from 0 to 255, by the rule of clean-fid.

    That is PIL's bicubic filter, which widens when it shrinks, so that nothing aliases; each channel in floating point,
    so that nothing is rounded (Parmar et al., arXiv 2104.11222).
    """
    if picture.shape[:2] == (height, width):
        return picture.astype(np.float32)
    channels = [
        np.asarray(
            Image.fromarray(picture[..., c].astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
        )
        for c in range(3)
    ]
    return np.stack(channels, -1).clip(0, 255)


def to_tensor(pictures: Sequence[NDArray[np.uint8 | np.float32]] | Pictures) -> Tensor:
    """Pictures [H, W, 3] of one size, from 0 to 255 -> float32 [n, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack(list(pictures))).permute(0, 3, 1, 2).float() / 127.5 - 1
