"""Encode renders for the diffusion training: faces, and the 20 condition pictures of each mask, by the runtime's rules.

    python -m examples.demo_checkpoint.latents --data build/demo/train.npz --output build/demo/train_latents.pt
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from examples.demo_checkpoint.renders import Renders, palette_pictures, pictures, planes
from mogle_rt.conditioning import pack_latents
from mogle_rt.config import NUM_CLASSES

BLACK, WHITE = 0, 1  # rows of the pictures that all masks share


class Encoder:
    """Packed latents of pictures, one at a time: on a CPU a picture's activations then stay in its caches."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """[P, 3, H, W] in [-1, 1] -> fp16 [P, N, 64]."""
        config = self.vae.config
        parts = [self.vae.encode(one.contiguous()).latent_dist.mean for one in x.split(1)]
        return pack_latents((torch.cat(parts) - config.shift_factor) * config.scaling_factor).half()


def encode(data: Renders, encoder: Encoder, count: int) -> dict[str, Tensor]:
    """Latents of the first ``count`` renders.

    Returns:
        ``faces`` [n, N, 64]; ``rows`` [R, N, 64], distinct condition pictures, the black and the white one first;
        ``index`` [n, 20], each mask's pictures in ``rows``.
    """
    size = data.images.shape[1]
    flat = torch.ones(1, 3, size, size)
    rows = [encoder(-flat), encoder(flat)]
    index = np.full((count, 1 + NUM_CLASSES), BLACK)
    faces = []
    number, start = 2, time.perf_counter()
    for i in range(count):
        labels = data.labels[i : i + 1]
        faces.append(encoder(pictures(data.images[i : i + 1])))
        present = np.unique(labels)
        rows.append(encoder(torch.cat([palette_pictures(labels), *(planes(labels, int(c)) for c in present)])))
        index[i, np.r_[0, 1 + present]] = range(number, number + 1 + len(present))
        number += 1 + len(present)
        if (i + 1) % 200 == 0:
            print(f"{i + 1} renders, {number} pictures, {time.perf_counter() - start:.0f} s", flush=True)
    return {"faces": torch.cat(faces), "rows": torch.cat(rows), "index": torch.from_numpy(index)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("build/demo/train.npz"))
    parser.add_argument("--vae", type=Path, default=Path("build/demo/vae"))
    parser.add_argument("--output", type=Path, default=Path("build/demo/train_latents.pt"))
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--count", type=int, default=10**9)
    args = parser.parse_args()
    data = Renders(args.data)
    data.images, data.labels = data.images[args.start :], data.labels[args.start :]
    vae = AutoencoderKL.from_pretrained(args.vae).float().eval()
    torch.save(encode(data, Encoder(vae), min(args.count, len(data.images))), args.output)


if __name__ == "__main__":
    main()
