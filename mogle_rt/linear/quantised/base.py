"""What the quantised formats share: how they are read, and the product by unpacking, which any device can do.

Where fused kernels run, a format multiplies by kernels of its own. Elsewhere a weight is unpacked into
memory that all layers share, just before its product, and multiplied as a plain one. That takes the time of the exact
product and a little more, and the memory of the stored weight.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from mogle_rt.bundle.storage import Int8Storage, WeightStorage
from mogle_rt.errors import CheckpointError, ConfigError
from mogle_rt.linear.contract import CPU, Further, Multiply, SlotLayout, StoredLayer, WeightFormat
from mogle_rt.linear.plain import dense_product
from mogle_rt.linear.quantised.rotation import rotate
from mogle_rt.torch_api.private import has_values

IN_CACHE = 1 << 18  # numbers that are unpacked at a time
SCALES = "weight_scale"
COLUMNS, ROWS = "further columns", "further rows"  # of `Further`, beside the kinds of stored tensors


class QuantisedWeight(WeightFormat):
    """A weight [out, in] in a stored format. What rides along stays in the activations' dtype, beside it.

    Args:
        stored: where it is read from.
        tensors: by kind, as stored, and what rides along as `COLUMNS` and `ROWS`.

    Attributes:
        values, scales: as stored, plain tensors without gaps.
        further_columns, further_rows: see `Further`; where weights are unpacked, the rows are rotated as the weight is.
        suspects: the kinds of stored tensors that may hold NaN or infinite values.
    """

    streamable = True
    suspects: ClassVar[tuple[str, ...]] = (SCALES,)

    def __init__(self, stored: StoredLayer, tensors: Mapping[str, Tensor]) -> None:
        self.storage = self._storage_of(stored)
        self.dtype, self._scratch, self._own = stored.dtype, stored.scratch, stored.shape
        self._by_kernels = self._multiplied_by_kernels(stored)
        self.path = "kernels" if self._by_kernels else "unpacked"
        self._rotation = _rotation_of(self.storage)
        self.values, self.scales = tensors["weight"], tensors[SCALES]
        self.further_columns, self.further_rows = tensors.get(COLUMNS), tensors.get(ROWS)
        rows = 0 if self.further_rows is None else len(self.further_rows)
        columns = 0 if self.further_columns is None else self.further_columns.shape[1]
        self.shape = (self._own[0] + rows, self._own[1] + columns)

    @classmethod
    def load(cls, stored: StoredLayer, further: Further, parts: tuple[slice, ...]) -> Self:
        """See `WeightFormat.load`. Any part can be asked for."""
        held = {kind: stored.load_stored(kind) for kind in cls._stored_kinds(stored)}
        cls._check(stored, held)
        return cls(stored, held | cls._riding(stored, further))._announced(parts)

    @classmethod
    def held_bytes(cls, stored: StoredLayer, shape: tuple[int, int]) -> int:
        """See `WeightFormat.held_bytes`: on a CPU, weights are views of the file."""
        return 0 if stored.device.type == "cpu" else super().held_bytes(stored, shape)

    @classmethod
    def slot_layout(cls, stored: StoredLayer, shape: tuple[int, int]) -> SlotLayout:
        """See `WeightFormat.slot_layout`: the stored tensors, then what rides along."""
        out, inner = stored.shape
        layout = [stored.stacked(kind) for kind in cls._stored_kinds(stored)]
        if shape[1] > inner:
            layout.append(((out, shape[1] - inner), stored.dtype))
        if shape[0] > out:
            layout.append(((shape[0] - out, inner), stored.dtype))
        return layout

    @classmethod
    def fill_slot(cls, stored: StoredLayer, further: Further, into: Sequence[Tensor]) -> None:
        """See `WeightFormat.fill_slot`."""
        riding = cls._riding(stored, further)
        for kind, tensor in zip([*cls._stored_kinds(stored), *riding], into, strict=True):
            if kind in riding:
                tensor.copy_(riding[kind])
            else:
                stored.copy_into(tensor, kind)

    @classmethod
    def in_slot(
        cls, stored: StoredLayer, further: Further, parts: tuple[slice, ...], tensors: Sequence[Tensor]
    ) -> Self:
        """See `WeightFormat.in_slot`. What is stored is checked now, and not each time that it is read.

        Raises:
            CheckpointError: stored numbers or scales are not finite.
        """
        for kind in cls._stored_kinds(stored):
            if kind in cls.suspects:
                cls._check(stored, {kind: stored.load_stored(kind, CPU)})
                stored.release(kind)
        kinds = [*cls._stored_kinds(stored), *cls._riding(stored, further)]
        return cls(stored, dict(zip(kinds, tensors, strict=True)))._announced(parts)

    def _announced(self, parts: tuple[slice, ...]) -> Self:
        """Itself, once it has said how much shared memory its largest part is unpacked into."""
        largest = max(len(range(*part.indices(self.shape[0]))) for part in parts)
        self._scratch.announce("weight", largest * self.shape[1])
        return self

    @classmethod
    def _stored_kinds(cls, stored: StoredLayer) -> list[str]:
        """The kinds of tensors that the weight is stored as."""
        return list(cls._storage_of(stored).kinds(stored.shape))

    @classmethod
    def _storage_of(cls, stored: StoredLayer) -> WeightStorage:
        storage = stored.storage
        if storage is None or storage.name != cls.name:
            raise ConfigError(
                f"layer {stored.names[0]!r} is not stored in {cls.name}: loading quantises nothing; make such a bundle "
                f"with `mogle-rt quantize --weights {cls.name}`"
            )
        return storage

    @classmethod
    def _riding(cls, stored: StoredLayer, further: Further) -> dict[str, Tensor]:
        """What rides along, as the product takes it."""
        riding = {}
        if further.columns is not None:
            riding[COLUMNS] = further.columns.contiguous()
        if further.rows is not None:
            by_kernels = cls._multiplied_by_kernels(stored)
            rotation = 1 if by_kernels else _rotation_of(cls._storage_of(stored))
            # Rotated on the CPU, so that streamed and resident ones are equal to the last bit.
            riding[ROWS] = further.rows if rotation == 1 else rotate(further.rows.cpu(), rotation).to(stored.device)
        return riding

    @classmethod
    def _multiplied_by_kernels(cls, stored: StoredLayer) -> bool:
        return stored.kernels and cls._kernels_take(stored)

    @classmethod
    def _check(cls, stored: StoredLayer, tensors: Mapping[str, Tensor]) -> None:
        """Check stored numbers, a part at a time.

        Raises:
            CheckpointError: some are NaN or infinite, or a scale is negative.
        """
        for kind in cls.suspects:
            if kind not in tensors or not has_values(tensors[kind]):
                continue
            layers, tensor = ", ".join(stored.names), tensors[kind]
            for part in tensor.split(max(1, 8 * IN_CACHE // max(1, math.prod(tensor.shape[1:])))):
                finite = bool(part.float().isfinite().all())
                if kind == SCALES and not (finite and bool((part >= 0).all())):
                    raise CheckpointError(f"the weight scales of {layers} hold NaN, infinite or negative values")
                if not finite:
                    raise CheckpointError(f"the tensors {kind!r} of {layers} hold NaN or infinite values")

    def tensors(self) -> list[Tensor]:
        """As stored, and what rides along."""
        return [self.values, self.scales, *(t for t in (self.further_columns, self.further_rows) if t is not None)]

    @classmethod
    def _kernels_take(cls, stored: StoredLayer) -> bool:
        """Whether the format's own kernels multiply such a layer, where kernels run at all."""
        return True

    @abstractmethod
    def _multiply(
        self, out: Tensor, bias: Tensor, rows: slice, low_up: Tensor | None, gelu: bool
    ) -> Callable[[tuple[Tensor, ...], Tensor | None], None]:
        """Prepare the product with some rows of the weight by the format's own kernels.

        Args:
            out: [l, columns], where the result is written. bias: [columns].
            rows: of the weight.
            low_up: [columns, R], of the branch that rides in the input's further columns.

        Returns:
            The product, of the inputs without further columns, and of these [l, R] or None.
        """

    @abstractmethod
    def _unpack(self, rows: slice, into: Tensor) -> None:
        """These rows of the weight, as they are stored (perhaps rotated), into [rows, in]."""

    def product(
        self, out: Tensor, bias: Tensor, *, columns: slice, widths: tuple[int, ...], gelu: bool
    ) -> tuple[Multiply, bool]:
        """See `WeightFormat.product`."""
        start, stop, _ = columns.indices(self.shape[0])
        if self._by_kernels:
            return self._product_by_kernels(out, bias, start, stop, gelu), gelu
        weight = self._scratch.take("weight", (stop - start, self.shape[1]), out.device, self.dtype)
        if self._rotation > 1:
            rotated = self._scratch.take("rotated", (len(out), self.shape[1]), out.device, self.dtype)
            multiply, gelu_done = dense_product(weight, out, bias, (self.shape[1],), gelu=gelu)
        else:
            multiply, gelu_done = dense_product(weight, out, bias, widths, gelu=gelu)

        def unpack_and_multiply(*inputs: Tensor) -> Tensor:
            self._fill(weight, start, stop)
            return multiply(*inputs) if self._rotation == 1 else multiply(self._rotated(inputs, rotated))

        return unpack_and_multiply, gelu_done

    def _product_by_kernels(self, out: Tensor, bias: Tensor, start: int, stop: int, gelu: bool) -> Multiply:
        (height, inner), further = self._own, self.further_rows
        own = out[:, : max(0, min(stop, height) - start)]
        up = None if self.further_columns is None else self.further_columns[start : min(stop, height)]
        multiply = self._multiply(own, bias[: own.shape[1]], slice(start, min(stop, height)), up, gelu)
        beyond = None if further is None or stop <= height else further[max(start - height, 0) : stop - height]
        assert beyond is None or not gelu, "columns in which a branch rides don't go through GELU"

        def run(*inputs: Tensor) -> Tensor:
            low = inputs[0][:, inner:] if up is not None else None
            plain = (inputs[0][:, :inner],) if up is not None else inputs
            multiply(plain, low)
            if beyond is not None:
                position, target = 0, out[:, own.shape[1] :]
                for x in plain:
                    part = beyond[:, position : position + x.shape[1]].t()
                    torch.mm(x, part, out=target) if position == 0 else target.addmm_(x, part)
                    position += x.shape[1]
            return out

        return run

    def _fill(self, weight: Tensor, start: int, stop: int) -> None:
        """The rows from start to stop of the extended weight."""
        out, inner = self._own
        step = max(1, IN_CACHE // inner)
        for first in range(start, min(stop, out), step):
            rows = slice(first, min(first + step, stop, out))
            self._unpack(rows, weight[rows.start - start : rows.stop - start, :inner])
        if self.further_columns is not None:
            weight[:, inner:].copy_(self.further_columns[start:stop])
        if self.further_rows is not None and stop > out:
            weight[out - start :].copy_(self.further_rows[max(start - out, 0) : stop - out])

    def _rotated(self, inputs: tuple[Tensor, ...], into: Tensor) -> Tensor:
        """The inputs side by side, of which the weight's own columns are rotated."""
        inner = self._own[1]
        if len(inputs) == 1 and inputs[0].shape[1] == inner:
            return rotate(inputs[0], self._rotation, out=into)
        position = 0
        for x in inputs:
            width = min(x.shape[1], inner - position)
            rotate(x[:, :width], self._rotation, out=into[:, position : position + width])
            into[:, position + width : position + x.shape[1]].copy_(x[:, width:])
            position += x.shape[1]
        return into


def _rotation_of(storage: WeightStorage) -> int:
    return storage.rotation if isinstance(storage, Int8Storage) else 1
