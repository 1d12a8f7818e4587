"""The plain format: a matrix in the activations' dtype. On a CPU it is a view of the file if possible."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mogle_rt.linear import onednn
from mogle_rt.linear.contract import Further, Multiply, SlotLayout, StoredLayer, WeightFormat
from mogle_rt.torch_api.private import addmm_gelu


class PlainWeight(WeightFormat):
    """A weight [out, in] as it is stored, or converted to the activations' dtype."""

    name = "plain"
    streamable = True
    narrows = True

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.dtype = matrix, matrix.dtype
        self.shape = (matrix.shape[0], matrix.shape[1])

    @classmethod
    def load(cls, stored: StoredLayer, further: Further, parts: tuple[slice, ...]) -> PlainWeight:
        """See `WeightFormat.load`. Products of any columns can be requested."""
        matrix = stored.load("weight")
        if further.columns is not None:
            matrix = torch.cat([matrix, further.columns], dim=1)
        if further.rows is not None:
            matrix = torch.cat([matrix, further.rows])
        return cls(matrix)

    @classmethod
    def held_bytes(cls, stored: StoredLayer, shape: tuple[int, int]) -> int:
        """See `WeightFormat.held_bytes`."""
        return 0 if stored.is_view and shape == stored.shape else super().held_bytes(stored, shape)

    @classmethod
    def slot_layout(cls, stored: StoredLayer, shape: tuple[int, int]) -> SlotLayout:
        """See `WeightFormat.slot_layout`: the matrix."""
        return [(shape, stored.dtype)]

    @classmethod
    def fill_slot(cls, stored: StoredLayer, further: Further, into: Sequence[Tensor]) -> None:
        """See `WeightFormat.fill_slot`."""
        (matrix,) = into
        out, inner = stored.shape
        stored.copy_into(matrix[:out, :inner])
        if further.columns is not None:
            matrix[:out, inner:] = further.columns
        if further.rows is not None:
            matrix[out:, :inner] = further.rows

    @classmethod
    def in_slot(
        cls, stored: StoredLayer, further: Further, parts: tuple[slice, ...], tensors: Sequence[Tensor]
    ) -> PlainWeight:
        """See `WeightFormat.in_slot`."""
        return cls(tensors[0])

    def tensors(self) -> list[Tensor]:
        """The matrix."""
        return [self.matrix]

    def product(
        self, out: Tensor, bias: Tensor, *, columns: slice, widths: tuple[int, ...], gelu: bool
    ) -> tuple[Multiply, bool]:
        """See `WeightFormat.product`."""
        return dense_product(self.matrix[columns, : sum(widths)], out, bias, widths, gelu=gelu)


def dense_product(
    weight: Tensor, out: Tensor, bias: Tensor, widths: tuple[int, ...], *, gelu: bool
) -> tuple[Multiply, bool]:
    """`WeightFormat.product` for a weight [columns, in] that PyTorch multiplies as it is. Other formats may use it."""
    if len(widths) == 1 and onednn.serves(weight, len(out)):
        return onednn.prepared(weight, bias, gelu=gelu), gelu
    first_weight, *other_weights = [w.t() for w in weight.split(widths, dim=1)]
    # cuBLAS computes GELU in its epilogue, but with several inputs the sum is complete only after the last one.
    within = gelu and not other_weights and out.device.type in ("cuda", "meta")

    def multiply(first: Tensor, *others: Tensor) -> Tensor:
        if within:
            return addmm_gelu(bias, first, first_weight, out)
        torch.addmm(bias, first, first_weight, out=out)
        for x, w in zip(others, other_weights, strict=True):
            out.addmm_(x, w)
        return out

    return multiply, within
