"""The choice of the format of loaded weights."""

from __future__ import annotations

import logging

import torch

from mogle_rt.bundle import schema
from mogle_rt.bundle.source import TensorSource
from mogle_rt.errors import ConfigError
from mogle_rt.linear.contract import StoredLayer
from mogle_rt.linear.formats import format_named
from mogle_rt.linear.packed import PackedWeight
from mogle_rt.linear.plain import PlainWeight
from mogle_rt.linear.quantised.base import QuantisedWeight
from mogle_rt.memory.budget import total_memory

logger = logging.getLogger(__name__)

SHARE = 0.8  # packed weights may take this much of the machine's memory


def choose_format(asked: str | None, source: TensorSource, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the requested format. The default is packed where it is supported and fits in memory, else plain.

    The choice depends only on the machine, the model and the dtype, so that a seed gives the same bytes in every run.
    (The number of steps plays no part either, though packing only pays off after two to eight steps.)

    Weights that are stored in eight or four bits are held as they are stored, whatever is chosen.

    Raises:
        ConfigError: there is no such format, or no layer is stored in it, because loading quantises nothing.
    """
    if asked is not None:
        stored = {storage.name for storage in source.storages.values()}
        if issubclass(format_named(asked), QuantisedWeight) and asked not in stored:
            raise ConfigError(
                f"no weight of this bundle is stored in {asked}, and loading quantises nothing; make such a bundle with "
                f"`mogle-rt quantize --weights {asked}`"
            )
        return asked
    needed = packed_bytes(source, device, dtype)
    total = total_memory() if needed else 0
    if needed > SHARE * total:
        logger.info(
            "weights stay in the plain format: packing them takes %.1f GB, the machine has %.1f GB in all",
            needed / 1e9,
            total / 1e9,
        )
        return PlainWeight.name
    return PackedWeight.name


def packed_bytes(source: TensorSource, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes that packing needs in addition to plain weights; 0 if none of the weights can be packed.

    The system may drop the pages of a mapped file when memory is short, and read them again later, but packed weights
    stay. Plain weights whose dtype differs from the file's are copies, and need as much memory as packed ones.
    """
    sizes, copied = [], 0
    config = source.config.transformer
    for _, stacked in schema.in_blocks(config, schema.DOUBLE_STACKED, schema.SINGLE_STACKED):
        names = tuple(f"transformer.{name}" for name in stacked.sources)
        stored = StoredLayer(source, names, device, dtype)
        out, inner = shape = stored.shape
        if stored.storage is not None or not PackedWeight.takes(shape, device, dtype):
            continue
        sizes.append(out * inner * dtype.itemsize)
        if source.tensors[f"{names[0]}.weight"].dtype == dtype:
            copied += sizes[-1]
    # Each part of the largest layer may exist three times at once: plain, with extra columns, and packed.
    return copied + 2 * max(sizes, default=0)
