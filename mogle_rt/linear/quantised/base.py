"""What the quantised formats share: how they are read, and the product by unpacking, which any device can do.

Where fused kernels run, a format multiplies by kernels of its own. Elsewhere a weight is unpacked into
memory that all layers share, just before its product, and multiplied as a plain one. That takes the time of the exact
product and a little more, and the memory of the stored weight.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from mogle_rt.bundle.storage import Int8Storage, WeightStorage
from mogle_rt.errors import CheckpointError, ConfigError
from mogle_rt.linear.contract import Further, Multiply, StoredLayer, WeightFormat
from mogle_rt.linear.plain import dense_product
from mogle_rt.linear.quantised.rotation import rotate
from mogle_rt.torch_api.private import has_values

IN_CACHE = 1 << 18  # numbers that are unpacked at a time


class QuantisedWeight(WeightFormat):
    """A weight [out, in] in a stored format. What rides along stays in the activations' dtype, beside it.

    Args:
        stored: where it is read from.
        further: what extends it.

    Attributes:
        values, scales: as stored, plain tensors without gaps.
        further_columns, further_rows: see `Further`; where weights are unpacked, the rows are rotated as the weight is.
    """

    def __init__(self, stored: StoredLayer, further: Further) -> None:
        storage = stored.storage
        if storage is None or storage.name != self.name:
            raise ConfigError(
                f"layer {stored.names[0]!r} is not stored in {self.name}: loading quantises nothing; make such a bundle "
                f"with `mogle-rt quantize --weights {self.name}`"
            )
        self.storage: WeightStorage = storage
        self.dtype, self._scratch, self._own = stored.dtype, stored.scratch, stored.shape
        self._by_kernels = stored.kernels and self._kernels_take(stored)
        self.path = "kernels" if self._by_kernels else "unpacked"
        self._rotation = storage.rotation if isinstance(storage, Int8Storage) else 1
        self.values, self.scales = stored.load_stored("weight"), stored.load_stored("weight_scale")
        _require_scales(stored, self.scales)
        self.further_columns = None if further.columns is None else further.columns.contiguous()
        self.further_rows = further.rows
        if self.further_rows is not None and not self._by_kernels:
            self.further_rows = rotate(self.further_rows, self._rotation)
        rows = 0 if self.further_rows is None else len(self.further_rows)
        columns = 0 if self.further_columns is None else self.further_columns.shape[1]
        self.shape = (self._own[0] + rows, self._own[1] + columns)

    @classmethod
    def load(cls, stored: StoredLayer, further: Further, parts: tuple[slice, ...]) -> Self:
        """See `WeightFormat.load`. Any part can be asked for."""
        weight = cls(stored, further)
        largest = max(len(range(*part.indices(weight.shape[0]))) for part in parts)
        weight._scratch.announce("weight", largest * weight.shape[1])
        return weight

    @classmethod
    def held_bytes(cls, stored: StoredLayer, shape: tuple[int, int]) -> int:
        """See `WeightFormat.held_bytes`: the bytes of all stored tensors; on a CPU they are views of the file."""
        if stored.device.type == "cpu":
            return 0
        names = [name for name in stored.source.tensors if name.rpartition(".")[0] in stored.names]
        infos = [stored.source.tensors[name] for name in names if not name.endswith(".bias")]
        return sum(info.numel * info.dtype.itemsize for info in infos)

    def tensors(self) -> list[Tensor]:
        """As stored, and what rides along."""
        return [self.values, self.scales, *(t for t in (self.further_columns, self.further_rows) if t is not None)]

    def _kernels_take(self, stored: StoredLayer) -> bool:
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


def _require_scales(stored: StoredLayer, scales: Tensor) -> None:
    if has_values(scales) and not (bool(scales.isfinite().all()) and bool((scales >= 0).all())):
        raise CheckpointError(f"the weight scales of {', '.join(stored.names)} hold NaN, infinite or negative values")


def require_finite(stored: StoredLayer, kind: str, tensor: Tensor) -> None:
    """Check stored numbers, a part at a time.

    Raises:
        CheckpointError: some are NaN or infinite.
    """
    if not has_values(tensor):
        return
    for part in tensor.split(max(1, 8 * IN_CACHE // max(1, tensor.shape[1]))):
        if not bool(part.float().isfinite().all()):
            raise CheckpointError(f"the tensors {kind!r} of {', '.join(stored.names)} hold NaN or infinite values")
