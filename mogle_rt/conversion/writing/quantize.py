"""From a bundle to a smaller one, whose blocks' weights are stored in eight or four bits."""

from __future__ import annotations

from pathlib import Path

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.bundle.storage import storage_named
from mogle_rt.conversion.tensors import StoredTensor
from mogle_rt.conversion.writing.write import WrittenWeights, write_bundle
from mogle_rt.errors import CheckpointError, OutputError


def quantize(
    checkpoint: str | Path, output: str | Path, weights: str, *, progress: bool | None = None
) -> WrittenWeights:
    """Write a bundle anew with its blocks' weights in a format of fewer bits. All else is copied as it is.

    Args:
        checkpoint: a bundle, or "demo".
        output: the bundle to write; it appears whole or not at all.
        weights: "int8", "fp8" or "int4".
        progress: True or False; None shows a bar on a terminal.

    Returns:
        How well each layer is kept.

    Raises:
        CheckpointError: no bundle, one that is quantised already, or with weights that are not finite.
        ConfigError: an unknown format, or one that can't hold a weight of the model's shapes.
        OutputError: ``output`` can't be written, or is the bundle itself.
    """
    storage_named(weights)
    bundle, output = Bundle(checkpoint), Path(output)
    if bundle.storages:
        held = ", ".join(sorted({storage.name for storage in bundle.storages.values()}))
        raise CheckpointError(f"{bundle.path}: its weights are stored in {held} already; quantise the original bundle")
    if output.exists() and output.samefile(bundle.path):
        raise OutputError(f"{output}: is the bundle to read; choose another name")
    tensors = {name: StoredTensor(bundle.path, info) for name, info in bundle.tensors.items()}
    return write_bundle(output, tensors, bundle.config, weights=weights, progress=progress)
