"""The formats of eight bits, int8 and fp8: values times a scale for each row."""

from __future__ import annotations

import torch
from torch import Tensor

from mogle_rt.linear.contract import Further, RowForm, StoredLayer
from mogle_rt.linear.quantised.base import QuantisedWeight, require_finite


class ScaledRows(QuantisedWeight):
    """A weight whose rows are values in eight bits times one scale each."""

    def _unpack(self, rows: slice, into: Tensor) -> None:
        into.copy_(self.values[rows]).mul_(self.scales[rows, None])


class Int8Weight(ScaledRows):
    """Integers from -127 to 127, after a rotation of groups of columns, see `mogle_rt.bundle.storage.Int8Storage`."""

    name = "int8"

    def __init__(self, stored: StoredLayer, further: Further) -> None:
        super().__init__(stored, further)
        self.wants = RowForm(torch.int8, self._rotation)


class Fp8Weight(ScaledRows):
    """Numbers in float8_e4m3, see `mogle_rt.bundle.storage.Fp8Storage`."""

    name = "fp8"

    def __init__(self, stored: StoredLayer, further: Further) -> None:
        super().__init__(stored, further)
        require_finite(stored, "weight", self.values)
        self.wants = RowForm(torch.float8_e4m3fn)
