"""Tensors to convert that have not been read yet. Each knows its shape, and yields its elements in chunks.

Conversion only moves, scales or unpacks rows. So there are only a few kinds of source: a range of a file, a tensor in
memory, a source that is multiplied by a scale, and several sources whose rows are concatenated.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mogle_rt.bundle.container import TensorInfo, read_chunks

# The dtype that weights of eight bits or fewer are unpacked to. It holds every value of such formats exactly, before
# their scale is applied.
UNPACKED = torch.bfloat16


class SourceTensor(ABC):
    """A tensor that has not been read yet.

    Attributes:
        shape: the tensor's shape.
        dtype: the data type of the chunks.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def chunks(self) -> Iterator[Tensor]:
        """Yield the elements, flat and in order, a few megabytes at a time. Each chunk may overwrite the last."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> SourceTensor:
        """The rows from ``start`` up to ``stop``, as a source."""

    @property
    def paths(self) -> set[Path]:
        """The files that this tensor is read from."""
        return set()

    def load(self) -> Tensor:
        """Read the whole tensor into new memory."""
        parts = [chunk.clone() for chunk in self.chunks()]
        return torch.cat(parts).view(self.shape) if parts else torch.empty(self.shape, dtype=self.dtype)


@dataclass(frozen=True)
class StoredTensor(SourceTensor):
    """A range of bytes in a safetensors file."""

    path: Path
    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.info.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.info.dtype

    @property
    def paths(self) -> set[Path]:
        return {self.path}

    def chunks(self) -> Iterator[Tensor]:
        return read_chunks(self.path, self.info, once=True)

    def rows(self, start: int, stop: int) -> SourceTensor:
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        begin = self.info.begin + start * size
        shape = (stop - start, *self.shape[1:])
        return StoredTensor(self.path, TensorInfo(self.dtype, shape, begin, begin + (stop - start) * size))


@dataclass(frozen=True, eq=False)
class HeldTensor(SourceTensor):
    """A tensor in memory."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.value.dtype

    def chunks(self) -> Iterator[Tensor]:
        yield self.value.detach().contiguous().reshape(-1)

    def rows(self, start: int, stop: int) -> SourceTensor:
        return HeldTensor(self.value[start:stop])


@dataclass(frozen=True)
class ScaledTensor(SourceTensor):
    """An 8-bit source multiplied by one number, in float32, and then rounded once to bfloat16."""

    source: SourceTensor
    scale: float = 1.0
    dtype: torch.dtype = UNPACKED

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.source.shape

    @property
    def paths(self) -> set[Path]:
        return self.source.paths

    def chunks(self) -> Iterator[Tensor]:
        for chunk in self.source.chunks():
            yield chunk.float().mul_(self.scale).to(self.dtype)

    def rows(self, start: int, stop: int) -> SourceTensor:
        return ScaledTensor(self.source.rows(start, stop), self.scale, self.dtype)


@dataclass(frozen=True)
class JoinedTensor(SourceTensor):
    """Several sources of one dtype, concatenated along their rows."""

    parts: Sequence[SourceTensor]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.parts[0].dtype

    @property
    def paths(self) -> set[Path]:
        return set().union(*(part.paths for part in self.parts))

    def chunks(self) -> Iterator[Tensor]:
        for part in self.parts:
            yield from part.chunks()

    def rows(self, start: int, stop: int) -> SourceTensor:
        taken, first = [], 0
        for part in self.parts:
            end = first + part.shape[0]
            if start < end and first < stop:
                taken.append(part.rows(max(start, first) - first, min(stop, end) - first))
            first = end
        return JoinedTensor(taken)


def swapped_halves(source: SourceTensor) -> SourceTensor:
    """Put the second half of the rows first, because FLUX's own files hold shift and scale in the opposite order."""
    half = source.shape[0] // 2
    return JoinedTensor([source.rows(half, 2 * half), source.rows(0, half)])
