"""Tensors of other people's files, unread: each knows its shape, and gives its elements a few megabytes at a time.

Conversion only ever moves rows about, scales them or unpacks them. So a source is one of a few kinds: a range of a
file, a tensor in memory, a source whose numbers are rescaled, or several that stand one below the other.
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

UNPACKED = torch.bfloat16  # what eight bits and fewer become: it holds every value of such a format but for its scale


class SourceTensor(ABC):
    """A tensor that has not been read yet.

    Attributes:
        shape: its sizes.
        dtype: what ``chunks`` gives.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def chunks(self) -> Iterator[Tensor]:
        """Its elements in order, flat, a few megabytes at a time. A chunk is valid until the next is asked for."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> SourceTensor:
        """These rows of it, as a source of their own."""

    @property
    def paths(self) -> set[Path]:
        """The files that it is read from."""
        return set()

    def load(self) -> Tensor:
        """The whole tensor, in memory of its own."""
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
    """A source in eight bits times one number, computed in float32 and rounded once to bfloat16."""

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
    """Sources of one dtype, one below the other."""

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
    """The second half of the rows before the first: shift and scale stand the other way round in FLUX's own files."""
    half = source.shape[0] // 2
    return JoinedTensor([source.rows(half, 2 * half), source.rows(0, half)])
