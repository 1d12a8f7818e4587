"""Encodes renders for the diffusion training: faces, and the 20 condition pictures that the runtime makes of a mask.

python -m examples.demo_checkpoint.latents --data build/demo/train.npz --output build/demo/train_latents.pt
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from examples.demo_checkpoint.renders import Renders, palette_pictures, pictures, planes
from mogle_rt.config import NUM_CLASSES
from mogle_rt.encoders.vae import pack_latents

BLACK, WHITE = 0, 1  # rows of the pictures that all masks share


class Encoder:
    """Encodes pictures to packed latents, one at a time, so that a picture's activations stay in the CPU's caches."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """[P, 3, H, W] in [-1, 1] -> fp16 [P, N, 64]."""
        config = self.vae.config
        parts = [self.vae.encode(one.contiguous()).latent_dist.mean for one in x.split(1)]
        return pack_latents((torch.cat(parts) - config.shift_factor) * config.scaling_factor).half()


def encode(data: Renders, encoder: Encoder, chosen: range) -> dict[str, Tensor]:
    """Latents of some renders.

    Returns:
        ``faces`` [n, N, 64]; ``rows`` [R, N, 64], the distinct condition pictures, beginning with black and white;
        ``index`` [n, 20], the rows that are each mask's pictures.
    """
    size = data.images.shape[1]
    flat = torch.ones(1, 3, size, size)
    rows = [encoder(-flat), encoder(flat)]
    index = np.full((len(chosen), 1 + NUM_CLASSES), BLACK)
    faces = []
    number = 2
    for row, i in enumerate(chosen):
        labels = data.labels[i : i + 1]
        faces.append(encoder(pictures(data.images[i : i + 1])))
        present = np.unique(labels)
        rows.append(encoder(torch.cat([palette_pictures(labels), *(planes(labels, int(c)) for c in present)])))
        index[row, np.r_[0, 1 + present]] = range(number, number + 1 + len(present))
        number += 1 + len(present)
    return {"faces": torch.cat(faces), "rows": torch.cat(rows), "index": torch.from_numpy(index)}


def merge(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Encode the renders one after the other."""
    merged, shift = [], 0
    for part in parts:
        merged.append(torch.where(part["index"] > WHITE, part["index"] + shift, part["index"]))
        shift += len(part["rows"]) - 2
    first = parts[0]["rows"]
    return {
        "faces": torch.cat([p["faces"] for p in parts]),
        "rows": torch.cat([first, *(p["rows"][2:] for p in parts[1:])]),
        "index": torch.cat(merged),
    }


def _work(data_path: Path, vae_path: Path, output: Path, chosen: range) -> None:
    torch.set_num_threads(1)
    vae = AutoencoderKL.from_pretrained(vae_path).float().eval()
    torch.save(encode(Renders(data_path), Encoder(vae), chosen), output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("build/demo/train.npz"))
    parser.add_argument("--vae", type=Path, default=Path("build/demo/vae"))
    parser.add_argument("--output", type=Path, default=Path("build/demo/train_latents.pt"))
    parser.add_argument("--count", type=int, default=10**9)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    count = min(args.count, len(Renders(args.data)))
    start = time.perf_counter()
    shares = [range(count * i // args.processes, count * (i + 1) // args.processes) for i in range(args.processes)]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.pt" for i in range(args.processes)]
        context = multiprocessing.get_context("spawn")
        with context.Pool(args.processes) as pool:
            pool.starmap(_work, [(args.data, args.vae, f, s) for f, s in zip(files, shares, strict=True)])
        latents = merge([torch.load(f, weights_only=True) for f in files])
    torch.save(latents, args.output)
    print(f"{count} renders, {len(latents['rows'])} pictures, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
