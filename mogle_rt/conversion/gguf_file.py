"""Read GGUF files: the gguf package unpacks tensors from ggml's block formats while they are read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mogle_rt.bundle.container import CHUNK
from mogle_rt.conversion.tensors import UNPACKED, SourceTensor
from mogle_rt.errors import CheckpointError, ConfigError
from mogle_rt.installed import install_command

UNPACKED_ALREADY = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_TENSORS = 100_000  # FLUX has 1,160 in its own names


@dataclass(frozen=True, eq=False)
class BlockTensor(SourceTensor):
    """A tensor in one of ggml's formats. Its rows are blocks of bytes, unpacked to float32 and then rounded once.

    Attributes:
        path: the file's path.
        data: a view of the file, with one row of bytes (or of numbers) for each row of the tensor.
        kind: the format, as a value of gguf's enumeration.
        shape, dtype: the shape and data type after unpacking.
    """

    path: Path
    data: Any
    kind: Any
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def paths(self) -> set[Path]:
        return {self.path}

    def chunks(self) -> Iterator[Tensor]:
        from gguf.quants import dequantize

        width = math.prod(self.shape[1:])
        at_once = max(1, CHUNK // (4 * max(1, width)))
        for start in range(0, len(self.data), at_once):
            try:
                values = dequantize(self.data[start : start + at_once], self.kind)
            except (NotImplementedError, ValueError) as error:
                raise CheckpointError(f"{self.path}: a tensor in {self.kind.name} can't be unpacked: {error}") from None
            yield torch.from_numpy(values.copy()).reshape(-1).to(self.dtype)

    def rows(self, start: int, stop: int) -> SourceTensor:
        return BlockTensor(self.path, self.data[start:stop], self.kind, (stop - start, *self.shape[1:]), self.dtype)


def read_gguf(path: Path) -> dict[str, SourceTensor]:
    """Find every tensor of a GGUF file. Formats of 16 and 32 bits keep their dtype; the others become bfloat16.

    Raises:
        CheckpointError: the file is missing, not a GGUF file, damaged or cut short.
        ConfigError: the package gguf is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ConfigError(f"{path}: GGUF files need the package gguf: {install_command('gguf')}") from None
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(f"{path}: not a GGUF file")
            file.seek(8)
            if int.from_bytes(file.read(8), "little") > MAX_TENSORS:
                raise CheckpointError(f"{path}: not a GGUF file, or damaged: it claims more than {MAX_TENSORS} tensors")
        reader = GGUFReader(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from None
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{path}: not a GGUF file, damaged or cut short: {reason}") from None
    _check_places(reader, path)
    tensors: dict[str, SourceTensor] = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        kind = tensor.tensor_type
        dtype = UNPACKED_ALREADY.get(kind.name, UNPACKED)
        data = tensor.data
        if not shape or len(data) != shape[0]:
            raise CheckpointError(f"{path}: tensor {tensor.name!r} of shape {list(shape)} has {len(data)} rows")
        tensors[tensor.name] = BlockTensor(path, data, kind, shape, dtype)
    return tensors


def _check_places(reader: Any, path: Path) -> None:
    """Check that all tensors come after the header and don't overlap.

    Raises:
        CheckpointError: a tensor overlaps the header or another tensor.
    """
    end, before = reader.data_offset, "the header"
    for tensor in sorted((t for t in reader.tensors if t.n_bytes), key=lambda t: t.data_offset):
        if tensor.data_offset < end:
            raise CheckpointError(f"{path}: damaged GGUF header: tensor {tensor.name!r} overlaps {before}")
        end, before = tensor.data_offset + tensor.n_bytes, f"tensor {tensor.name!r}"
