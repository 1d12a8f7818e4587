"""The interface of a weight format: how one weight matrix is read from a bundle, held in memory, and multiplied.

To add a format, write a subclass of `WeightFormat` in a file of its own and add a row to
`mogle_rt.linear.formats.FORMATS`. Layers, the model and the step use formats only through this interface.
"""

from __future__ import annotations

import enum
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from mogle_rt.bundle.source import TensorSource
from mogle_rt.bundle.storage import WeightStorage
from mogle_rt.linear.scratch import Scratch

CPU = torch.device("cpu")
# Takes inputs [rows, …] that stand side by side, and returns [rows, columns]. Every step passes the same tensors.
Multiply = Callable[..., Tensor]
SlotLayout: TypeAlias = "list[tuple[tuple[int, ...], torch.dtype]]"  # shapes and dtypes, see `WeightFormat.slot_layout`


class Place(enum.Enum):
    """The place of a layer in a block. It decides whether a low-rank branch can use extra columns of the product."""

    ALONE = "alone"
    AFTER_NORM = "after norm"  # the norm that writes the layer's input can write x A into extra columns of it
    BEFORE_RESIDUAL = "before residual"  # the addition that reads the output can add (x A) B; x A is in extra columns


@dataclass(frozen=True)
class StoredLayer:
    """The stored layers that make up one runtime layer, stacked along the output dimension.

    Attributes:
        source: where they are read from.
        names: full names of the stored layers, without the last part ("weight", "bias", …).
        device, dtype: the device on which products are computed, and the dtype of the activations.
        scratch: memory that the products of the model's layers share.
        kernels: whether the fused kernels run on the device, see `mogle_rt.ops.choice`.
    """

    source: TensorSource
    names: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    scratch: Scratch = field(default_factory=Scratch, compare=False)
    kernels: bool = False

    @property
    def storage(self) -> WeightStorage | None:
        """How the weight is stored, the same for all that are stacked; None if it is stored plainly."""
        return self.source.storages.get(self.names[0].removeprefix("transformer."))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        stored = [self.source.tensors[name].shape for name in self._tensors("weight")]
        shapes = [(s[0], s[1]) if self.storage is None else self.storage.shape_of(s) for s in stored]
        return sum(shape[0] for shape in shapes), shapes[0][1]

    @property
    def heights(self) -> list[int]:
        """The rows of each stored layer."""
        return [self.source.tensors[name].shape[0] for name in self._tensors("weight")]

    def load(self, kind: str, dtype: torch.dtype | None = None) -> Tensor:
        """The stacked tensors of one kind, such as "weight", in ``dtype`` (by default that of the activations).

        If nothing needs to be copied, the result is a view of the file and must not be written to.
        """
        return self.source.load(self._tensors(kind), self.device, dtype or self.dtype)

    def copy_into(self, into: Tensor, kind: str = "weight") -> None:
        """Copy the stacked tensors of one kind into a tensor on the CPU, converted to its dtype.

        The pages of each stored tensor are released once it is copied, so that at most one of them is in memory in
        addition to ``into``.

        Args:
            into: [out, in].
        """
        row = 0
        for name in self._tensors(kind):
            info = self.source.tensors[name]
            into[row : row + info.shape[0]].copy_(self.source.load([name], CPU, None))
            self.source.release([name])
            row += info.shape[0]

    def load_stored(self, kind: str, device: torch.device | None = None) -> Tensor:
        """The stacked tensors of a kind in the dtype that they are stored in, such as int8; otherwise as `load`.

        Args:
            device: where they are wanted, by default where products are computed.
        """
        return self.source.load(self._tensors(kind), device or self.device, None)

    def stacked(self, kind: str) -> tuple[tuple[int, ...], torch.dtype]:
        """The shape and dtype of what `load_stored` gives."""
        infos = [self.source.tensors[name] for name in self._tensors(kind)]
        return (sum(info.shape[0] for info in infos), *infos[0].shape[1:]), infos[0].dtype

    @property
    def is_view(self) -> bool:
        """Whether `load` gives a view of the file for the weight, which takes no memory of its own."""
        infos = [self.source.tensors[name] for name in self._tensors("weight")]
        neighbours = all(a.end == b.begin for a, b in itertools.pairwise(infos))
        return self.device.type == "cpu" and neighbours and all(info.dtype == self.dtype for info in infos)

    def release(self, kind: str) -> None:
        """Allow the memory of one kind's tensors to be freed: they are held elsewhere or no longer needed."""
        self.source.release(self._tensors(kind))

    def _tensors(self, kind: str) -> list[str]:
        return [f"{name}.{kind}" for name in self.names]


@dataclass(frozen=True)
class Further:
    """Extra columns and rows of a weight [out, in], so that a low-rank branch is computed in the same product.

    Attributes:
        columns: [out, R], multiplied with R extra columns of the input; None if there are none.
        rows: [R, in], which produce R extra columns of the output; None if there are none.
    """

    columns: Tensor | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class RowForm:
    """A quantised row with its scale: how a format wants the rows of its input, in place of plain numbers.

    Attributes:
        dtype: of the values, int8 or float8_e4m3.
        rotation: columns that are rotated together before the row is scaled, see `mogle_rt.linear.quantised.rotation`.
    """

    dtype: torch.dtype
    rotation: int = 1


class WeightFormat(ABC):
    """One weight matrix in one format.

    Attributes:
        name: the name of the format.
        streamable: whether several weights can use the same memory in turn. If so, the format implements `slot_layout`,
            `fill_slot` and `in_slot`.
        shape: (out, in) of the product, including the extra rows and columns of `Further`.
        dtype: the dtype of the activations.
        wants: the form that the product gives the rows of its input before it multiplies. None: they are used as they are.
        path: how products are computed, in a word for reports, if a format has several ways; otherwise "".
        narrows: whether a product can leave out the last columns of the input, and compute any first ones of the output.
    """

    name: ClassVar[str]
    streamable: ClassVar[bool] = False
    narrows: ClassVar[bool] = False
    shape: tuple[int, int]
    dtype: torch.dtype
    wants: RowForm | None = None
    path: str = ""

    @classmethod
    def takes(cls, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the format can hold a weight (out, in) on this device, with activations of this dtype.

        Other weights, such as those too small to benefit, are held in the plain format.
        """
        return True

    @classmethod
    def rides(cls, place: Place, rank: int, *, fused: bool) -> bool:
        """Whether a branch of this rank is computed in extra columns: of the input after a norm, of the output before a
        residual. Otherwise the branch is two separate products, added in place.

        Args:
            fused: norms write the extra columns, and residuals use them, in the same pass over memory.
        """
        return fused and rank > 0 and place is not Place.ALONE

    @classmethod
    @abstractmethod
    def load(cls, stored: StoredLayer, further: Further, parts: tuple[slice, ...]) -> WeightFormat:
        """Read a weight and bring it into this format.

        Args:
            stored: where the weight is stored.
            further: the rows and columns to add to it.
            parts: for each product that will be requested, its columns of the output. Together they cover all columns.
        """

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All tensors that the weight holds."""

    @property
    def nbytes(self) -> int:
        """Bytes held. A view of a file counts with the bytes in the file."""
        return sum(t.nbytes for t in self.tensors())

    @abstractmethod
    def product(
        self, out: Tensor, bias: Tensor, *, columns: slice, widths: tuple[int, ...], gelu: bool
    ) -> tuple[Multiply, bool]:
        """Prepare x Wᵀ + bias for inputs of one shape. The product is prepared once and called in every step.

        Args:
            out: [rows, columns], where the result may be written. A library may instead allocate its own result.
            bias: [columns].
            columns: which columns of the output to compute; one of the ``parts`` given to `load`, or any if it `narrows`.
            widths: widths of the inputs that stand side by side; their sum is ``shape[1]``, or less if it `narrows`.
            gelu: apply GELU (tanh form) if the product can include it without a separate pass.

        Returns:
            The product, and whether it includes GELU.
        """

    @classmethod
    def held_bytes(cls, stored: StoredLayer, shape: tuple[int, int]) -> int:
        """Bytes of memory that a weight takes once it is loaded; 0 for a view of the file.

        Args:
            shape: (out, in) of the product, including the extra rows and columns of `Further`.
        """
        layout = cls.slot_layout(stored, shape) if cls.streamable else [(shape, stored.dtype)]
        return sum(math.prod(sizes) * dtype.itemsize for sizes, dtype in layout)

    @classmethod
    def slot_layout(cls, stored: StoredLayer, shape: tuple[int, int]) -> SlotLayout:
        """The shapes and dtypes of the contiguous tensors that hold a streamed weight.

        Args:
            shape: (out, in) of the product, including the extra rows and columns of `Further`.
        """
        raise NotImplementedError(f"weights in the format {cls.name} can't be streamed")

    @classmethod
    def fill_slot(cls, stored: StoredLayer, further: Further, into: Sequence[Tensor]) -> None:
        """Read a weight into tensors of `slot_layout` on the CPU. A separate thread calls this in every step.

        Args:
            stored, further: see `load`; ``further`` is on the CPU.
        """
        raise NotImplementedError(f"weights in the format {cls.name} can't be streamed")

    @classmethod
    def in_slot(
        cls, stored: StoredLayer, further: Further, parts: tuple[slice, ...], tensors: Sequence[Tensor]
    ) -> WeightFormat:
        """A weight whose products use the values that these tensors hold at the time of each call.

        Its products must give the same bytes as those of a weight made by `load`.

        Args:
            stored, further, parts: see `load`.
            tensors: tensors of `slot_layout`, on the device of the products.
        """
        raise NotImplementedError(f"weights in the format {cls.name} can't be streamed")
