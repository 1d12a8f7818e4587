"""The format of four bits: groups of a row's columns with a scale each, and a low-rank part in bfloat16."""

from __future__ import annotations

from itertools import accumulate

from torch import Tensor

from mogle_rt.bundle.storage import Int4Storage
from mogle_rt.linear.contract import Further, StoredLayer
from mogle_rt.linear.quantised.base import QuantisedWeight, require_finite
from mogle_rt.linear.quantised.rounding import unpack_int4


class Int4Weight(QuantisedWeight):
    """See `mogle_rt.bundle.storage.Int4Storage`. Activations stay as they are.

    Attributes:
        down: bfloat16 [R, in], the low-rank parts of all stacked layers, one below the other.
        up: bfloat16 [out, rank]: each row belongs to the part of its own layer.
    """

    name = "int4"

    def __init__(self, stored: StoredLayer, further: Further) -> None:
        super().__init__(stored, further)
        assert isinstance(self.storage, Int4Storage)
        self._rank = self.storage.rank
        self.down = self.up = None
        self._ends = list(accumulate(stored.heights))  # of the stacked layers' rows
        if self._rank:
            self.down, self.up = stored.load_stored("weight_down"), stored.load_stored("weight_up")
            for kind, tensor in (("weight_down", self.down), ("weight_up", self.up)):
                require_finite(stored, kind, tensor)

    def tensors(self) -> list[Tensor]:
        """See `QuantisedWeight.tensors`."""
        return [*super().tensors(), *(t for t in (self.down, self.up) if t is not None)]

    def _unpack(self, rows: slice, into: Tensor) -> None:
        unpack_int4(self.values[rows], self.scales[rows], into)
        if self.down is None or self.up is None:
            return
        start = 0
        for number, end in enumerate(self._ends):
            first, last = max(rows.start, start), min(rows.stop, end)
            if first < last:
                down = self.down[number * self._rank : (number + 1) * self._rank]
                into[first - rows.start : last - rows.start].addmm_(
                    self.up[first:last].to(into.dtype), down.to(into.dtype)
                )
            start = end
