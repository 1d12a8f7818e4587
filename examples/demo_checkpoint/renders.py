"""Rendered data on disk, as arrays, and as tensors of any size.

A folder holds the pixels of all pictures one after the other (``images.u8``, ``labels.u8``), and a line of JSON for each
picture with its attributes and captions (``people.jsonl``). The files only ever grow, so that rendering can go on, and
readers map them into memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mogle_rt.config import NUM_CLASSES
from mogle_rt.masks import CLASS_NAMES, PALETTE

Bytes = NDArray[np.uint8]

LARGE = tuple(
    CLASS_NAMES.index(name) for name in ("background", "skin", "hair", "cloth")
)  # classes that give way to smaller ones where a mask is made smaller


class Writer:
    """Adds renders to a folder.

    Attributes:
        count: renders that are there.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        people = folder / "people.jsonl"
        people.touch()
        self.count = people.read_bytes().count(b"\n")
        (folder / "size.json").write_text(json.dumps({"size": size}))
        for name, channels in (("images.u8", 3), ("labels.u8", 1)):
            (folder / name).touch()
            with open(folder / name, "r+b") as file:  # what an interruption left half-written goes
                file.truncate(self.count * size * size * channels)

    def add(self, images: list[Bytes], labels: list[Bytes], people: list[dict[str, Any]]) -> None:
        """Add pictures [S, S, 3], labels [S, S] and what is known of them. The lines come last: they tell what is whole."""
        for name, arrays in (("images.u8", images), ("labels.u8", labels)):
            with open(self.folder / name, "ab") as file:
                file.write(np.stack(arrays).tobytes())
        with open(self.folder / "people.jsonl", "a") as file:
            file.write("".join(json.dumps(person) + "\n" for person in people))
        self.count += len(images)


class Renders:
    """The renders of a folder, at most ``count``.

    Attributes:
        images: [n, S, S, 3]. labels: [n, S, S]. captions: n lists of 3. attributes: n dicts.
    """

    def __init__(self, folder: Path, count: int | None = None) -> None:
        lines = (folder / "people.jsonl").read_text().splitlines()[:count]
        people = [json.loads(line) for line in lines]
        size = json.loads((folder / "size.json").read_text())["size"]
        shape = (len(people), size, size)
        self.images: Bytes = np.memmap(folder / "images.u8", np.uint8, "r", shape=(*shape, 3))
        self.labels: Bytes = np.memmap(folder / "labels.u8", np.uint8, "r", shape=shape)
        self.attributes: list[dict[str, Any]] = [p["attributes"] for p in people]
        self.captions: list[list[str]] = [p["captions"] for p in people]

    def __len__(self) -> int:
        return len(self.attributes)


def middle(images: Bytes, labels: Bytes, size: tuple[int, int]) -> tuple[Bytes, Bytes]:
    """The largest part of a size's shape around the middle: images [n, S, S, 3], labels [n, S, S]."""
    S = labels.shape[1]
    h, w = (S * side // max(size) for side in size)
    y, x = (S - h) // 2, (S - w) // 2
    return images[:, y : y + h, x : x + w], labels[:, y : y + h, x : x + w]


def resize(images: Bytes, labels: Bytes, height: int, width: int) -> tuple[Bytes, Bytes]:
    """Smaller pictures and masks: images [n, H, W, 3], labels [n, H, W] -> [n, height, width, ...].

    Where a small class has more than 0.4 of a new pixel, it wins against the large ones, so that lips stay closed lines.
    """
    if images.shape[1:3] == (height, width):
        return np.array(images), np.array(labels)
    x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, (height, width), mode="bilinear", antialias=True).round().clamp(0, 255).byte()
    planes = []
    for c in range(NUM_CLASSES):
        plane = torch.from_numpy(labels == c)[:, None].float()
        cover = F.interpolate(plane, (height, width), mode="bilinear", antialias=True)
        planes.append(cover if c in LARGE else cover * 1.25)
    return x.permute(0, 2, 3, 1).numpy(), torch.cat(planes, 1).argmax(1).byte().numpy()


def pictures(images: Bytes) -> Tensor:
    """[n, H, W, 3] -> [n, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


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
