"""Bundles with FLUX.1-dev's width in sparse files: random numbers in a few blocks, holes (zeros) elsewhere.

They take no room on the disk and no time to make, and their weights are as large as the released model's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from mogle_rt.bundle import schema
from mogle_rt.bundle.bundle import FORMAT, FORMAT_VERSION
from mogle_rt.bundle.container import TensorInfo, header_room, write_header
from mogle_rt.config import FLUX_DEV, TransformerConfig
from mogle_rt.cost.job import FLUX_BUNDLE
from mogle_rt.encoders.vae import autoencoder, tensor_shapes


def write_sparse_bundle(
    path: Path,
    transformer: TransformerConfig = FLUX_DEV,
    *,
    real_blocks: Iterable[str] = (),
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write a bundle without text encoders.

    Args:
        transformer: FLUX's configuration, with fewer blocks if wanted.
        real_blocks: prefixes of stored tensors that get random numbers, as "transformer_blocks.0.". All that is outside
            of the blocks gets them, too. Without any prefix, the whole bundle is zeros.
        dtype: of the stored tensors.
    """
    config = replace(FLUX_BUNDLE, transformer=transformer)
    ranks = dict.fromkeys(schema.lora_modules(transformer), 4)
    shapes = {
        "transformer": schema.transformer_tensors(transformer),
        "lora": schema.lora_tensors(transformer, ranks),
        "mogle": schema.mogle_tensors(config.mogle),
        "vae": tensor_shapes(autoencoder(config.vae)),
    }
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "config": json.dumps({k: v if k == "vae" else asdict(v) for k, v in vars(config).items() if v is not None}),
        "sha256": "0" * 64,
    }
    named = {f"{part}.{name}": shape for part, those in shapes.items() for name, shape in those.items()}
    position = start = header_room(list(named), metadata)
    tensors = {}
    for name, shape in named.items():
        end = position + math.prod(shape) * dtype.itemsize
        tensors[name], position = TensorInfo(dtype, shape, position, end), end
    outside = ("transformer.x_embedder.", "transformer.proj_out.", "transformer.context_embedder.", "mogle.", "vae.")
    real = tuple(f"transformer.{prefix}" for prefix in real_blocks)
    real += outside if real else ()
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        write_header(file, tensors, metadata, start)
        file.truncate(position)
        for name, info in tensors.items():
            if name.startswith(real):
                values = torch.randn(info.numel, generator=generator).mul_(0.02).to(dtype)
                file.seek(info.begin)
                file.write(values.view(torch.uint8).numpy().data)
    return path
