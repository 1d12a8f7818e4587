"""The packed format for CPUs: float32 weights in oneDNN's own layout."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from mogle_rt.linear import onednn
from mogle_rt.linear.contract import Further, Multiply, Place, SlotLayout, StoredLayer, WeightFormat
from mogle_rt.linear.plain import PlainWeight

# All rows, not only the branch's own, pay for extra columns. Beyond this rank, adding a branch in place is cheaper. (At
# rank 16, products, branch and GELU together took 7 to 15 % less time with extra columns if the weight had 256 columns,
# and 0.7 % less if it had 3072.)
MOST_PACKED_RANK = 32


class PackedWeight(WeightFormat):
    """A weight [out, in], held as one packed matrix for each part. No plain copy of it is kept.

    Branches after a norm use extra columns up to a rank of `MOST_PACKED_RANK`, even if the norm is not fused, because
    GELU can then be part of the product.
    """

    name = "packed"
    streamable = True

    def __init__(self, matrices: dict[tuple[int, int, int], Tensor], shape: tuple[int, int]) -> None:
        self._matrices, self.shape, self.dtype = matrices, shape, torch.float32

    @classmethod
    def takes(cls, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> bool:
        """Whether this is a large float32 weight on a CPU."""
        return onednn.packs(shape, device, dtype)

    @classmethod
    def rides(cls, place: Place, rank: int, *, fused: bool) -> bool:
        """See `WeightFormat.rides`."""
        in_input = place is Place.AFTER_NORM and 0 < rank <= MOST_PACKED_RANK
        return in_input or super().rides(place, rank, fused=fused)

    @classmethod
    def load(cls, stored: StoredLayer, further: Further, parts: tuple[slice, ...]) -> PackedWeight:
        """See `WeightFormat.load`. The file's pages are released after each part."""
        plain = stored.load("weight")
        if further.rows is not None:
            plain = torch.cat([plain, further.rows])
        columns = 0 if further.columns is None else further.columns.shape[1]
        shape = (plain.shape[0], plain.shape[1] + columns)
        matrices = {}
        for part in parts:
            up = None if further.columns is None else further.columns[part]
            matrices[part.indices(shape[0])] = onednn.pack(_widened(plain[part], up))
            stored.release("weight")
        return cls(matrices, shape)

    @classmethod
    def slot_layout(cls, stored: StoredLayer, shape: tuple[int, int]) -> SlotLayout:
        """See `WeightFormat.slot_layout`: the matrix, not packed."""
        return PlainWeight.slot_layout(stored, shape)

    @classmethod
    def fill_slot(cls, stored: StoredLayer, further: Further, into: Sequence[Tensor]) -> None:
        """See `WeightFormat.fill_slot`."""
        PlainWeight.fill_slot(stored, further, into)

    @classmethod
    def in_slot(
        cls, stored: StoredLayer, further: Further, parts: tuple[slice, ...], tensors: Sequence[Tensor]
    ) -> WeightFormat:
        """See `WeightFormat.in_slot`."""
        return PackedInEachCall(tensors[0])

    def tensors(self) -> list[Tensor]:
        """The packed matrices."""
        return list(self._matrices.values())

    def product(
        self, out: Tensor, bias: Tensor, *, columns: slice, widths: tuple[int, ...], gelu: bool
    ) -> tuple[Multiply, bool]:
        """See `WeightFormat.product`. A packed matrix takes one input only."""
        assert len(widths) == 1, "inputs that are multiplied with a packed weight must lie in one buffer"
        return onednn.prepared(self._matrices[columns.indices(self.shape[0])], bias, gelu=gelu), gelu


class PackedInEachCall(WeightFormat):
    """A weight [out, in] whose values change between calls, so that oneDNN packs it in every call.

    Its products equal those of `PackedWeight` bit for bit. For FLUX's layers and 2,560 rows, packing takes a hundredth
    of the product's time.
    """

    name = PackedWeight.name

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.dtype = matrix, matrix.dtype
        self.shape = (matrix.shape[0], matrix.shape[1])

    @classmethod
    def load(cls, stored: StoredLayer, further: Further, parts: tuple[slice, ...]) -> WeightFormat:
        """A weight that is loaded once is a `PackedWeight`."""
        return PackedWeight.load(stored, further, parts)

    def tensors(self) -> list[Tensor]:
        """The matrix."""
        return [self.matrix]

    def product(
        self, out: Tensor, bias: Tensor, *, columns: slice, widths: tuple[int, ...], gelu: bool
    ) -> tuple[Multiply, bool]:
        """See `WeightFormat.product`."""
        assert len(widths) == 1, "inputs that are multiplied with a packed weight must lie in one buffer"
        weight = self.matrix[columns]
        if len(out) > 1 and onednn.plain_equals_packed():
            return onednn.prepared(weight, bias, gelu=gelu), gelu

        def multiply(x: Tensor) -> Tensor:
            # Products with plain weights round differently for a single row, and in older releases for any number.
            return onednn.linear(x, onednn.pack(weight), bias, gelu=gelu)

        return multiply, gelu


def _widened(weight: Tensor, columns: Tensor | None) -> Tensor:
    """The weight and the extra columns side by side, in memory that returns to the system as soon as it is freed.

    (C's allocator may keep freed memory for later.)
    """
    if columns is None:
        return weight
    room = mmap.mmap(-1, (weight.numel() + columns.numel()) * weight.itemsize)
    widened = torch.frombuffer(room, dtype=weight.dtype).view(len(weight), -1)
    return torch.cat([weight, columns], dim=1, out=widened)
