"""Linear layers whose low-rank branch acts on the last rows only (the condition's; REFERENCE: LoRA on the branch).

One product with the base weight serves all rows. The branch comes on top in one of three ways (`Ride`): as two small
products over its own rows, added in place; or riding along with the product, in further columns of its input or of its
output, which costs no pass of its own where a fused kernel makes or uses these columns anyway. On a CPU weights stay
views of the file and the branch is added in place, until they are packed (see `mogle_rt.packing`): the branch then rides
in the inputs of q, k, v and single blocks' MLPs, so that GELU needs no pass of its own either.
"""

from __future__ import annotations

import enum
import mmap
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mogle_rt import onednn
from mogle_rt.activation import gelu

# Of a branch that rides in a packed weight. All rows pay for its columns; beyond that, adding in place costs less. (At
# rank 16 of 256 columns, products, branch and GELU together took 7 to 15 % less time; of 3072 columns, 0.7 %.)
MOST_PACKED_RANK = 32
RANK_STEP = 16  # a packed branch's rank is filled up to a multiple, so that rows start at whole cache lines


class Ride(enum.Enum):
    """Where a layer's low-rank branch is computed."""

    NONE = "none"  # in place, after the product
    INPUT = "input"  # the input holds x A in further columns, the weight B in further columns
    OUTPUT = "output"  # the output holds x A in further columns, the weight A in further rows


def empty_parameter(*shape: int) -> nn.Parameter:
    """A frozen parameter that is loaded later, without memory until then."""
    return nn.Parameter(torch.empty(*shape, device="meta"), requires_grad=False)


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


def flat(x: Tensor) -> Tensor:
    """[l, B, D] -> [l * B, D], always a view."""
    return x.view(x.shape[0] * x.shape[1], x.shape[2])


def first_columns(buffer: Tensor, length: int, columns: int) -> Tensor:
    """Room for [length, B, columns] at the beginning of a contiguous buffer [L, B, D], without gaps."""
    batch = buffer.shape[1]
    return buffer.view(-1)[: length * batch * columns].view(length, batch, columns)


class Product:
    """A layer on rows of one shape, into a buffer. What shapes decide (which views, which rows) is worked out once.

    Args:
        layer: weights.
        out: [l, B, out_columns or fewer].
        lora_from: the first of the l rows with LoRA; for layers without LoRA it says nothing.
        columns: of the layer's output, those that are wanted (not where the branch rides in the output).
        split: widths of the inputs that stand side by side; by default there is one.
        gelu_scratch: the result goes through GELU (tanh form), for which this room, of out's shape, may be used.
        stays: the result is wanted in ``out``. Otherwise it may lie elsewhere, where a library brings its own memory.
    """

    def __init__(
        self,
        layer: Linear,
        out: Tensor,
        lora_from: int = 0,
        *,
        columns: slice = slice(None),
        split: tuple[int, ...] | None = None,
        gelu_scratch: Tensor | None = None,
        stays: bool = True,
    ) -> None:
        weight = layer.rows(columns)
        widths = split or (weight.shape[1],)
        self._bias, self._out, self._stays = layer.bias[columns].detach(), flat(out), stays
        by_onednn = len(widths) == 1 and onednn.serves(weight, len(self._out))
        self._for_onednn = weight if by_onednn else None
        self._weights = [] if by_onednn else [w.t() for w in weight.split(widths, dim=1)]
        self._scratch = None if gelu_scratch is None else flat(gelu_scratch)
        self._downs: list[Tensor] = []
        if isinstance(layer, LoraLinear) and layer.ride is Ride.NONE and lora_from < out.shape[0]:
            self._tail_from = lora_from * out.shape[1]
            self._tail = self._out[self._tail_from :]
            self._up = layer.lora_up[:, columns].detach()
            self._downs = list(layer.lora_down.detach().split(widths))
        # Where a library does GELU with the product, it is no pass of its own. It comes after the LoRA, if there is one.
        with_gelu = by_onednn or out.device.type in ("cuda", "meta")
        self._gelu_within = gelu_scratch is not None and with_gelu and not self._downs

    def __call__(self, *inputs: Tensor) -> Tensor:
        """inputs: [l * B, …]. Returns [l * B, columns]: ``out``, if it stays there, else that or memory of its own."""
        first, *others = inputs
        if self._for_onednn is not None:
            y = onednn.linear(first, self._for_onednn, self._bias, gelu=self._gelu_within)
        elif self._gelu_within:
            y = torch._addmm_activation(self._bias, first, self._weights[0], use_gelu=True, out=self._out)
        else:
            y = torch.addmm(self._bias, first, self._weights[0], out=self._out)
        for x, weight in zip(others, self._weights[1:], strict=True):
            y.addmm_(x, weight)
        scratch = None if self._gelu_within else self._scratch
        if self._stays and scratch is None and y is not self._out:
            y = self._out.copy_(y)
        if self._downs:
            low = torch.mm(first[self._tail_from :], self._downs[0])
            for x, down in zip(others, self._downs[1:], strict=True):
                low.addmm_(x[self._tail_from :], down)
            tail = self._tail if y is self._out else y[self._tail_from :]
            tail.addmm_(low, self._up)
        return y if scratch is None else gelu(y, scratch, self._out if self._stays else y)
