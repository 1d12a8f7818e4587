"""The packed format: float32 weights laid out as oneDNN reads them, for CPUs."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from mogle_rt.linear import onednn
from mogle_rt.linear.contract import Further, Multiply, Place, StoredLayer, WeightFormat

# All rows pay for the columns of a branch that rides along; beyond this rank, adding it in place costs less. (At rank 16
# of 256 columns, products, branch and GELU together took 7 to 15 % less time riding; of 3072 columns, 0.7 %.)
MOST_PACKED_RANK = 32


class PackedWeight(WeightFormat):
    """A weight [out, in], in as many packed matrices as there are parts. No plain copy of it is kept.

    Branches after a norm ride along up to a rank of `MOST_PACKED_RANK`, whether or not the norm is fused: GELU is then
    done within the product.
    """

    name = "packed"

    def __init__(self, matrices: dict[tuple[int, int, int], Tensor], shape: tuple[int, int]) -> None:
        self._matrices, self.shape, self.dtype = matrices, shape, torch.float32

    @classmethod
    def takes(cls, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> bool:
        """Large float32 weights on a CPU."""
        return onednn.packs(shape, device, dtype)

    @classmethod
    def rides(cls, place: Place, rank: int, *, fused: bool) -> bool:
        """See `WeightFormat.rides`."""
        in_input = place is Place.AFTER_NORM and 0 < rank <= MOST_PACKED_RANK
        return in_input or super().rides(place, rank, fused=fused)

    @classmethod
    def load(cls, stored: StoredLayer, further: Further, parts: tuple[slice, ...]) -> PackedWeight:
        """See `WeightFormat.load`. The file's pages are given back after each part."""
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

    def tensors(self) -> list[Tensor]:
        """The packed matrices."""
        return list(self._matrices.values())

    def product(
        self, out: Tensor, bias: Tensor, *, columns: slice, widths: tuple[int, ...], gelu: bool
    ) -> tuple[Multiply, bool]:
        """See `WeightFormat.product`. A packed matrix takes one input only."""
        assert len(widths) == 1, "inputs that are multiplied with a packed weight must lie in one buffer"
        return onednn.prepared(self._matrices[columns.indices(self.shape[0])], bias, gelu=gelu), gelu


def _widened(weight: Tensor, columns: Tensor | None) -> Tensor:
    """The weight and further columns side by side, in memory that goes back to the system at once.

    (C's allocator may keep for later what it is given back.)
    """
    if columns is None:
        return weight
    room = mmap.mmap(-1, (weight.numel() + columns.numel()) * weight.itemsize)
    widened = torch.frombuffer(room, dtype=weight.dtype).view(len(weight), -1)
    return torch.cat([weight, columns], dim=1, out=widened)
