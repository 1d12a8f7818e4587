"""The format of four bits: groups of a row's columns with a scale each, and a low-rank part in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate

from torch import Tensor

from mogle_rt.bundle.storage import Int4Storage
from mogle_rt.linear.contract import StoredLayer
from mogle_rt.linear.quantised.base import QuantisedWeight
from mogle_rt.linear.quantised.rounding import unpack_int4


class Int4Weight(QuantisedWeight):
    """See `mogle_rt.bundle.storage.Int4Storage`. Activations stay as they are.

    Attributes:
        down: bfloat16 [R, in], the low-rank parts of all stacked layers, one below the other.
        up: bfloat16 [out, rank]: each row belongs to the part of its own layer.
    """

    name = "int4"
    suspects = (*QuantisedWeight.suspects, "weight_down", "weight_up")

    def __init__(self, stored: StoredLayer, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(stored, tensors)
        assert isinstance(self.storage, Int4Storage)
        self._rank = self.storage.rank
        self.down, self.up = tensors.get("weight_down"), tensors.get("weight_up")
        self._ends = list(accumulate(stored.heights))  # of the stacked layers' rows

    def tensors(self) -> list[Tensor]:
        """See `QuantisedWeight.tensors`."""
        return [*super().tensors(), *(t for t in (self.down, self.up) if t is not None)]

    @classmethod
    def _kernels_take(cls, stored: StoredLayer) -> bool:
        """Groups of a power of two, and stacked layers of which each fills whole tiles."""
        storage = cls._storage_of(stored)
        assert isinstance(storage, Int4Storage)
        group = storage.group
        return group & (group - 1) == 0 and group <= 64 and all(height % 16 == 0 for height in stored.heights)

    def _multiply(
        self, out: Tensor, bias: Tensor, rows: slice, low_up: Tensor | None, gelu: bool
    ) -> Callable[[tuple[Tensor, ...], Tensor | None], None]:
        from mogle_rt.ops import few_bits  # here, as Triton may be missing

        starts = [0, *self._ends[:-1]]
        spans = [(max(rows.start, a), min(rows.stop, b)) for a, b in zip(starts, self._ends, strict=True)]
        layers = [number for number, (a, b) in enumerate(spans) if a < b]
        heights = [spans[number][1] - spans[number][0] for number in layers]
        group = self._own[1] // self.scales.shape[1]

        def multiply(inputs: tuple[Tensor, ...], low: Tensor | None) -> None:
            packed, scales = self.values[rows], self.scales[rows]
            up = None if self.up is None else self.up[rows]
            down = None if self.down is None else self.down[layers[0] * self._rank : (layers[-1] + 1) * self._rank]
            first = 0
            for number, x in enumerate(inputs):
                last = first + x.shape[1]
                few_bits.int4_linear(
                    x,
                    packed[:, first // 2 : last // 2],
                    scales[:, first // group : last // group],
                    None if down is None else down[:, first:last],
                    up,
                    heights,
                    number > 0,
                    bias,
                    low,
                    low_up,
                    out,
                    gelu and number == len(inputs) - 1,
                )
                first = last

        return multiply

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
