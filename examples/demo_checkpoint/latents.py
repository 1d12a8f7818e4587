"""Encodes renders for the diffusion training: faces, and the 20 condition pictures that the runtime makes of a mask.

    python -m examples.demo_checkpoint.latents --data build/demo/train --output build/demo/latents --count 6000

Each render is encoded at one of several sizes, see `SIZES`; half of them are cut out of the render, and some have a rough
version of the mask (see `rough`) beside the exact one. The folder holds a file for every `SHARD` renders. What is there is
kept, and training may begin before all is there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from examples.demo_checkpoint.attributes import Attributes, visible
from examples.demo_checkpoint.renders import Renders, palette_pictures, pictures, planes, resize
from examples.demo_checkpoint.rough import rough
from examples.demo_checkpoint.training import PRODUCTS, save_state
from mogle_rt.config import NUM_CLASSES, VAE_SCALE
from mogle_rt.encoders.vae import pack_latents

BLACK, WHITE = 0, 1  # rows of the pictures that all masks share
SHARD = 32
# Height and width in pixels, in the order in which shards take them; small sizes are the cheapest to learn from.
SQUARE, MIDDLE, LARGE, TALL, SLIM = (128, 128), (192, 192), (256, 256), (256, 192), (192, 128)
SIZES = (SQUARE, MIDDLE, SQUARE, SLIM, SQUARE, MIDDLE, SQUARE, TALL, SQUARE, MIDDLE, SQUARE, LARGE,
         SQUARE, MIDDLE, SQUARE, SLIM, SQUARE, MIDDLE, SQUARE)  # fmt: skip
ROUGH = 0.4  # the share of renders with a rough mask, too
CUT = 0.5  # the share of renders of which only a part is used
NO_REGION = 255  # in `cells`: no class covers more than half of the cell


class Encoder:
    """Encodes pictures to packed latents, one at a time, so that a picture's activations stay in the CPU's caches."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """[P, 3, H, W] in [-1, 1] -> fp16 [P, N, 64]."""
        config = self.vae.config
        with torch.autocast("cpu", PRODUCTS, enabled=PRODUCTS.itemsize < 4):
            parts = [
                self.vae.encode(one.contiguous(memory_format=torch.channels_last)).latent_dist.mean.float()
                for one in x.split(1)
            ]
        return pack_latents((torch.cat(parts) - config.shift_factor) * config.scaling_factor).half()


def cut(
    images: NDArray[np.uint8], labels: NDArray[np.uint8], size: tuple[int, int], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A part of a render [1, S, S, 3] of a size's shape, made as small as the size: [1, h, w, 3], [1, h, w]."""
    S, (height, width) = labels.shape[1], size
    share = rng.uniform(0.78, 1.0) if rng.random() < CUT else 1.0
    share = max(share, max(size) / S)
    h, w = (round(S * share * side / max(size)) for side in size)
    y = int(rng.integers(0, S - h + 1))
    x = int(np.clip(rng.normal((S - w) / 2, 0.1 * (S - w) + 1e-6), 0, S - w))
    area = (slice(None), slice(y, y + h), slice(x, x + w))
    return resize(images[area], labels[area], height, width)


def cell_classes(labels: NDArray[np.uint8]) -> Tensor:
    """The class that covers more than half of each latent cell: [n, H, W] -> uint8 [n, H / 8 * W / 8]."""
    cover = torch.stack([F.avg_pool2d(torch.from_numpy(labels == c).float(), VAE_SCALE) for c in range(NUM_CLASSES)], 1)
    most, number = cover.flatten(2).max(1)
    return torch.where(most > 0.5, number, NO_REGION).byte()


def encode(data: Renders, encoder: Encoder, chosen: range, size: tuple[int, int]) -> dict[str, Any]:
    """Latents of some renders.

    Returns:
        ``faces`` [n, N, 64]; ``rows`` [R, N, 64], the distinct condition pictures, beginning with black and white;
        ``index`` and ``rough`` [n, 20], the rows that are the pictures of each exact and each rough mask (the same where
        there is no rough one); ``cells`` [n, 4 N], see `cell_classes`; ``people``, what each picture shows, as JSON.
    """
    flat = torch.ones(1, 3, *size)
    rows = [encoder(-flat), encoder(flat)]
    count = 2
    faces, cells, people = [], [], []
    index = np.full((2, len(chosen), 1 + NUM_CLASSES), BLACK)

    def add(labels: NDArray[np.uint8]) -> NDArray[np.int64]:
        nonlocal count
        present = np.unique(labels)
        rows.append(encoder(torch.cat([palette_pictures(labels), *(planes(labels, int(c)) for c in present)])))
        numbers = np.full(1 + NUM_CLASSES, BLACK)
        numbers[np.r_[0, 1 + present]] = range(count, count + 1 + len(present))
        count += 1 + len(present)
        return numbers

    for n, i in enumerate(chosen):
        rng = np.random.default_rng([7, i])
        image, labels = cut(data.images[i : i + 1], data.labels[i : i + 1], size, rng)
        faces.append(encoder(pictures(image)))
        cells.append(cell_classes(labels))
        people.append(visible(Attributes(**data.attributes[i]), labels).to_dict())
        index[:, n] = add(labels)
        if rng.random() < ROUGH:
            index[1, n] = add(rough(labels[0], rng)[None])
    exact, other = torch.from_numpy(index)
    return {
        "faces": torch.cat(faces), "rows": torch.cat(rows), "index": exact, "rough": other, "cells": torch.cat(cells),
        "people": json.dumps(people),
    }  # fmt: skip


def _work(data_path: Path, vae_path: Path, output: Path, count: int, numbers: range) -> None:
    torch.set_num_threads(1)
    encoder = Encoder(AutoencoderKL.from_pretrained(vae_path).float().eval())
    data = Renders(data_path, count)
    for number in numbers:
        size = SIZES[number % len(SIZES)]
        path = output / f"{size[0]}x{size[1]}-{number:05d}.pt"
        if not path.exists():
            chosen = range(number * SHARD, min(count, (number + 1) * SHARD))
            save_state(path, encode(data, encoder, chosen, size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("build/demo/train"))
    parser.add_argument("--vae", type=Path, default=Path("build/demo/vae"))
    parser.add_argument("--output", type=Path, default=Path("build/demo/latents"))
    parser.add_argument("--count", type=int, default=10**9, help="renders at most")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    count = min(args.count, len(Renders(args.data)))
    start, P = time.perf_counter(), args.processes
    shards = -(-count // SHARD)
    with multiprocessing.get_context("spawn").Pool(P) as pool:
        pool.starmap(_work, [(args.data, args.vae, args.output, count, range(p, shards, P)) for p in range(P)])
    print(f"{count} renders, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
