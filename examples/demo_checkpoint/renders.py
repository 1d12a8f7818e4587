"""Reads rendered data, as arrays and as tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mogle_rt.masks import PALETTE

Bytes = NDArray[np.uint8]


class Renders:
    """A file of `render.save`.

    Attributes:
        images: [n, S, S, 3]. labels: [n, S, S]. captions: [n, 3]. attributes: n dicts.
    """

    def __init__(self, path: Path) -> None:
        with np.load(path) as data:
            self.images: Bytes = data["images"]
            self.labels: Bytes = data["labels"]
            self.captions: NDArray[Any] = data["captions"]
            self.attributes: list[dict[str, Any]] = json.loads(str(data["attributes"]))

    def __len__(self) -> int:
        return len(self.images)


def pictures(images: Bytes) -> Tensor:
    """[n, H, W, 3] -> [n, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def palette_pictures(labels: Bytes) -> Tensor:
    """Labels [n, H, W] -> masks in the class colours, [n, 3, H, W] in [-1, 1]."""
    return pictures(PALETTE[labels])


def planes(labels: Bytes, number: int) -> Tensor:
    """Labels [n, H, W] -> the plane of one class, [n, 3, H, W]: 1 where the class is, else -1."""
    return (torch.from_numpy(labels == number).float() * 2 - 1)[:, None].expand(-1, 3, -1, -1)


def psnr(a: Tensor, b: Tensor) -> float:
    """The mean PSNR of pictures in [-1, 1], in dB."""
    error = ((a.clamp(-1, 1) - b) / 2).square().mean((1, 2, 3))
    return float(-10 * torch.log10(error + 1e-8).mean())
