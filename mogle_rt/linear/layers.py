"""Linear layers whose low-rank branch acts on the last rows only (the condition's; REFERENCE: LoRA on the branch).

One product with the base weight serves all rows. The branch comes on top in one of three ways (`Ride`): as two small
products over its own rows, added in place; or riding along with the product, in further columns of its input or of its
output, which costs no pass of its own where a fused kernel makes or uses these columns anyway. On a CPU weights stay
views of the file and the branch is added in place, until they are packed (see `mogle_rt.memory.packing`): the branch
then rides in the inputs of q, k, v and single blocks' MLPs, so that GELU needs no pass of its own either.
"""

from __future__ import annotations

import enum
import mmap
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mogle_rt.linear import onednn
from mogle_rt.linear.views import empty_parameter

# Of a branch that rides in a packed weight. All rows pay for its columns; beyond that, adding in place costs less. (At
# rank 16 of 256 columns, products, branch and GELU together took 7 to 15 % less time; of 3072 columns, 0.7 %.)
MOST_PACKED_RANK = 32
RANK_STEP = 16  # a packed branch's rank is filled up to a multiple, so that rows start at whole cache lines


class Ride(enum.Enum):
    """Where a layer's low-rank branch is computed."""

    NONE = "none"  # in place, after the product
    INPUT = "input"  # the input holds x A in further columns, the weight B in further columns
    OUTPUT = "output"  # the output holds x A in further columns, the weight A in further rows


class Linear(nn.Module):
    """Weights of y = x Wᵀ + b; `Product` computes it.

    Args:
        padding: so many further columns of y are zeros: where rows of another layer's output have so many more, and
            lie in one buffer with these, cuBLAS adds the bias in its epilogue only if no gaps are left between the rows.
        parts: the columns of y that products ask for, which together are all; by default all at once.
    """

    def __init__(
        self, in_features: int, out_features: int, padding: int = 0, parts: tuple[slice, ...] = (slice(None),)
    ) -> None:
        super().__init__()
        self.padding, self._parts = padding, parts
        self.weight = empty_parameter(out_features + padding, in_features)
        self.bias = empty_parameter(out_features + padding)
        self._packed: dict[tuple[int, int, int], Tensor] = {}

    @property
    def packable(self) -> bool:
        """Whether `pack` makes products faster. (Parts go with the whole; a small one costs no more than it did.)"""
        return onednn.packs(self.weight)

    def pack(self, done: Callable[[], None]) -> None:
        """Lay the weight out as oneDNN reads it; the plain one goes. ``done`` is called after each part of it."""
        packed = {}
        for part in self._parts:
            packed[self._key(part)] = onednn.pack(self._to_pack(part))
            done()
        self._packed, self.weight = packed, empty_parameter(*self.weight.shape)

    def rows(self, part: slice) -> Tensor:
        """The weight of these columns of y, [part, in]: a view of the whole, or packed."""
        return self._packed[self._key(part)] if self._packed else self.weight[part].detach()

    def _to_pack(self, part: slice) -> Tensor:
        return self.weight[part].detach()

    def _key(self, part: slice) -> tuple[int, int, int]:
        return part.indices(len(self.bias))


class LoraLinear(Linear):
    """Weights of y = x Wᵀ + b for every row, and + x A B for rows of the branch.

    (The layers of q, k and v are one such layer: their A lie side by side, B is block-diagonal.) A is [in, R] and
    B [R, out], the transposes of what LoRA files hold. Where the branch rides along, the weight is [out, in + R] or
    [out + R, in], the latter with a bias of out + R.

    Args:
        ride: where the branch is computed. packed_ride: where, once the weight is packed: INPUT, or as before.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        ride: Ride = Ride.NONE,
        packed_ride: Ride = Ride.NONE,
        parts: tuple[slice, ...] = (slice(None),),
    ) -> None:
        self.ride, self.rank, self._packed_ride = ride, rank, packed_ride
        self.in_columns = in_features + (rank if ride is Ride.INPUT else 0)
        self.out_columns = out_features + (rank if ride is Ride.OUTPUT else 0)
        super().__init__(self.in_columns, self.out_columns, parts=parts)
        self.lora_down = empty_parameter(in_features, rank)
        self.lora_up = empty_parameter(rank, out_features)

    @property
    def _widens(self) -> bool:
        """Whether packing moves the branch into the input's further columns."""
        wanted = self.ride is Ride.NONE and self._packed_ride is Ride.INPUT
        return wanted and 0 < self.rank <= MOST_PACKED_RANK

    def pack(self, done: Callable[[], None]) -> None:
        """`Linear.pack`, the branch's B with the weight where it is to ride."""
        if not self._widens:
            super().pack(done)
        else:
            filled = F.pad(self.lora_down.t(), (0, 0, 0, -self.rank % RANK_STEP)).t()
            super().pack(done)
            self.ride, self.rank = Ride.INPUT, filled.shape[1]
            self.in_columns += self.rank
            self.lora_down = nn.Parameter(filled, requires_grad=False)
            self.lora_up = empty_parameter(*filled.shape[1:], self.lora_up.shape[1])  # it is in the packed weight

    def _to_pack(self, part: slice) -> Tensor:
        weight = super()._to_pack(part)
        if not self._widens:
            return weight
        up = F.pad(self.lora_up[:, part].t(), (0, -self.rank % RANK_STEP))
        # In memory of its own, which goes back to the system at once: C's allocator may keep it.
        room = mmap.mmap(-1, (weight.numel() + up.numel()) * weight.itemsize)
        widened = torch.frombuffer(room, dtype=weight.dtype).view(len(weight), -1)
        return torch.cat([weight, up], dim=1, out=widened)

    @property
    def down_before(self) -> Tensor | None:
        """A, for whoever makes the input's further columns; None where there are none."""
        return self.lora_down if self.ride is Ride.INPUT else None

    @property
    def up_after(self) -> Tensor | None:
        """B, for whoever uses the output's further columns; None where there are none."""
        return self.lora_up if self.ride is Ride.OUTPUT else None
