"""The formats of eight bits, int8 and fp8: values times a scale for each row."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mogle_rt.linear.contract import RowForm, StoredLayer
from mogle_rt.linear.quantised.base import QuantisedWeight


class ScaledRows(QuantisedWeight):
    """A weight whose rows are values in eight bits times one scale each."""

    def _unpack(self, rows: slice, into: Tensor) -> None:
        into.copy_(self.values[rows]).mul_(self.scales[rows, None])

    def _multiply(
        self, out: Tensor, bias: Tensor, rows: slice, low_up: Tensor | None, gelu: bool
    ) -> Callable[[tuple[Tensor, ...], Tensor | None], None]:
        from mogle_rt.ops import few_bits  # here, as Triton may be missing

        count, wanted = (len(out), self._own[1]), self.wants
        assert wanted is not None
        values = self._scratch.take("rows", count, out.device, wanted.dtype)
        scales = self._scratch.take("row scales", count[:1], out.device, torch.float32)

        def multiply(inputs: tuple[Tensor, ...], low: Tensor | None) -> None:
            more = inputs[1] if len(inputs) > 1 else None
            few_bits.quantize_rows(inputs[0], more, values, scales, wanted.rotation)
            few_bits.scaled_linear(values, scales, self.values[rows], self.scales[rows], bias, low, low_up, out, gelu)

        return multiply


class Int8Weight(ScaledRows):
    """Integers from -127 to 127, after a rotation of groups of columns, see `mogle_rt.bundle.storage.Int8Storage`."""

    name = "int8"

    def __init__(self, stored: StoredLayer, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(stored, tensors)
        self.wants = RowForm(torch.int8, self._rotation)


class Fp8Weight(ScaledRows):
    """Numbers in float8_e4m3, see `mogle_rt.bundle.storage.Fp8Storage`."""

    name = "fp8"
    suspects = (*ScaledRows.suspects, "weight")

    def __init__(self, stored: StoredLayer, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(stored, tensors)
        self.wants = RowForm(torch.float8_e4m3fn)

    @classmethod
    def _kernels_take(cls, stored: StoredLayer) -> bool:
        from mogle_rt.ops import few_bits

        return few_bits.multiplies_fp8(stored.device)
