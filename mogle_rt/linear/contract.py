"""What a weight format is: how one weight matrix is stored in a bundle, held in memory, and multiplied.

A new format is a subclass of `WeightFormat` in a file of its own and a row in `mogle_rt.linear.formats.FORMATS`.
Layers, the model and the step know formats through this interface only.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mogle_rt.bundle.source import TensorSource

Multiply = Callable[..., Tensor]  # inputs [rows, …], side by side -> [rows, columns]; in every step the same tensors


class Place(enum.Enum):
    """Where a layer stands in a block. It decides where a low-rank branch may ride along."""

    ALONE = "alone"
    AFTER_NORM = "after norm"  # the norm that writes its input can write x A into further columns of it
    BEFORE_RESIDUAL = "before residual"  # the addition that reads its output can add (x A) B, x A in further columns


@dataclass(frozen=True)
class StoredLayer:
    """The stored layers that one runtime layer is made of, stacked along the output dimension.

    Attributes:
        source: where they are read from.
        names: of the stored layers, in full, without what follows ("weight", "bias", …).
        device, dtype: where products are computed, and the dtype of their activations.
    """

    source: TensorSource
    names: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        shapes = [self.source.tensors[name].shape for name in self._tensors("weight")]
        return sum(shape[0] for shape in shapes), shapes[0][1]

    def load(self, kind: str, dtype: torch.dtype | None = None) -> Tensor:
        """The stacked tensors of a kind, as "weight"; in ``dtype``, by default that of the activations.

        Where nothing needs to be copied, the result is a view of the file and must not be written to.
        """
        return self.source.load(self._tensors(kind), self.device, dtype or self.dtype)

    def release(self, kind: str) -> None:
        """The tensors of a kind need not stay in memory: their contents are held elsewhere, or no longer needed."""
        self.source.release(self._tensors(kind))

    def _tensors(self, kind: str) -> list[str]:
        return [f"{name}.{kind}" for name in self.names]


@dataclass(frozen=True)
class Further:
    """Columns and rows by which a weight [out, in] is extended, so that a low-rank branch rides along in its product.

    Attributes:
        columns: [out, R], multiplied with R further columns of the input; None if there are none.
        rows: [R, in], which make R further columns of the output; None if there are none.
    """

    columns: Tensor | None = None
    rows: Tensor | None = None


class WeightFormat(ABC):
    """One weight matrix in one format.

    Attributes:
        name: of the format.
        shape: (out, in) of the product, with what was `Further`.
        dtype: of the activations.
    """

    name: ClassVar[str]
    shape: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def takes(cls, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the format serves a weight (out, in) on this device, with activations of this dtype.

        What it doesn't take, as a weight too small to be worth it, is held in the plain format.
        """
        return True

    @classmethod
    def rides(cls, place: Place, rank: int, *, fused: bool) -> bool:
        """Whether a branch of this rank rides along in further columns: of the input after a norm, of the output before
        a residual. Otherwise it is two products of its own, added in place.

        Args:
            fused: norms make further columns, and residuals use them, in the same pass over memory.
        """
        return fused and rank > 0 and place is not Place.ALONE

    @classmethod
    @abstractmethod
    def load(cls, stored: StoredLayer, further: Further, parts: tuple[slice, ...]) -> WeightFormat:
        """Read a weight and lay it out.

        Args:
            stored: where it is.
            further: what extends it.
            parts: columns of the output, those of every product that will be asked for; together they are all.
        """

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All that is held."""

    @property
    def nbytes(self) -> int:
        """Bytes held; of a view of a file, the file's."""
        return sum(t.nbytes for t in self.tensors())

    @abstractmethod
    def product(
        self, out: Tensor, bias: Tensor, *, columns: slice, widths: tuple[int, ...], gelu: bool
    ) -> tuple[Multiply, bool]:
        """x Wᵀ + bias for rows of one shape, prepared once and called in every step.

        Args:
            out: [rows, columns], where the result may go. It may lie elsewhere, where a library brings its own memory.
            bias: [columns].
            columns: of the output; one of ``parts`` as given to `load`.
            widths: of the inputs that stand side by side; their sum is ``shape[1]``.
            gelu: the result is to go through GELU (tanh form), if that is no pass of its own.

        Returns:
            The product, and whether GELU is done within it.
        """
