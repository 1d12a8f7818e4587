"""Weights laid out for oneDNN in the plain ones' place: which ones, and whether they find room."""

from __future__ import annotations

import logging
from functools import partial

from mogle_rt.bundle import schema
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.linear.layers import Linear
from mogle_rt.memory.budget import free_memory
from mogle_rt.model.transformer import Transformer

logger = logging.getLogger(__name__)

ROOM = 0.8  # so much of the free memory they may take


def to_pack(model: Transformer, bundle: Bundle) -> list[tuple[Linear, list[str]]]:
    """Layers that are faster packed, with the names of their stored weights; none if they don't find room.

    The system may drop a mapped file's pages when memory is short, and read them again; packed weights stay. The length
    of a run doesn't count, though packing took as long as it saves in two to eight steps: one seed is to give the same
    bytes whatever was drawn before.
    """
    if model.proj_out.weight.device.type != "cpu":
        return []
    layers = []
    for name, stacked in schema.in_blocks(model.config, schema.DOUBLE_STACKED, schema.SINGLE_STACKED):
        layer = model.get_submodule(name)
        if isinstance(layer, Linear) and layer.packable:
            layers.append((layer, [f"transformer.{source}.weight" for source in stacked.sources]))
    if not layers:
        return []
    mapped = [layer for layer, names in layers if bundle.tensors[names[0]].dtype == layer.weight.dtype]
    # Each of the largest layer's parts may be there three times: plain, with further columns, and packed.
    needed = sum(layer.weight.nbytes for layer in mapped) + 2 * max(layer.weight.nbytes for layer, _ in layers)
    free = free_memory()
    if needed > ROOM * free:
        logger.info("weights stay as they are: packing them takes %.1f GB, %.1f GB are free", needed / 1e9, free / 1e9)
        return []
    return layers


def pack(layers: list[tuple[Linear, list[str]]], bundle: Bundle) -> None:
    """Lay them out anew, and let go of the file's pages."""
    # The largest first: while one is laid out it is there twice, which counts most at the end.
    for layer, names in sorted(layers, key=lambda item: -item[0].weight.nbytes):
        layer.pack(partial(bundle.release, names))
