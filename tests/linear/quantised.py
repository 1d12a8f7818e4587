"""Bundles and layers in formats of few bits, made from those of other tests."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.bundle.storage import WeightStorage
from mogle_rt.conversion.tensors import StoredTensor
from mogle_rt.conversion.writing import write
from mogle_rt.linear.quantised.rounding import dequantised, quantised
from tests.linear.layers import Held, RandomLayer


def quantised_bundle(path: Path, output: Path, weights: str) -> Path:
    """Write the bundle in a format: every layer of it, even those that are so small that they lose much."""
    bundle = Bundle(path)
    tensors = {name: StoredTensor(bundle.path, info) for name, info in bundle.tensors.items()}
    bounds = write.LEAST_SIGNAL_TO_NOISE
    try:
        write.LEAST_SIGNAL_TO_NOISE = dict.fromkeys(bounds, 0.0)
        write.write_bundle(output, tensors, bundle.config, weights=weights, progress=False)
    finally:
        write.LEAST_SIGNAL_TO_NOISE = bounds
    return output


class QuantisedLayer(RandomLayer):
    """A random layer whose two stored ones are in a format of few bits. `weight` is the matrix that they stand for."""

    def quantise(self, storage: WeightStorage) -> QuantisedLayer:
        held: dict[str, Tensor] = dict(self.source._held)
        for name in "ab":
            plain = held.pop(f"{name}.weight")
            parts = quantised(plain, storage)
            held |= {f"{name}.{kind}": value for kind, value in parts.items()}
            rows = slice(0, len(plain)) if name == "a" else slice(len(self.weight) - len(plain), None)
            self.weight[rows] = dequantised(parts, storage)
        self.source = Held(held, dict.fromkeys("ab", storage))
        return self
