"""Read safetensors files without loading them, by their header, in chunks or through a memory map; write their header.

The format is an 8-byte little-endian header length, a JSON header, and the tensors' bytes. This module reads it without
the `safetensors` package, because a bundle needs three things that the package doesn't offer: one zero-copy view over
adjacent tensors, reading in chunks, and writing tensor by tensor.
"""

from __future__ import annotations

import errno
import itertools
import json
import mmap
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mogle_rt.errors import CheckpointError, InsufficientMemoryError

if TYPE_CHECKING:
    import torch

# A dtype's code in the format: PyTorch's name, and bytes. They are names so that a header can be read without PyTorch.
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}
DTYPE_CODES = {f"torch.{name}": code for code, (name, _) in DTYPES.items()}
MAX_HEADER = 100 << 20  # the safetensors package refuses larger ones too
MOST_DIMENSIONS = 64  # the most dimensions of a tensor, as in NumPy; a convolution's weight has four
READ_AHEAD = 128 << 10  # bytes: for each request, Linux reads no more ahead than a disk's read-ahead, by default this
CHUNK = 8 << 20  # bytes held in memory at once while a tensor is read in chunks


@dataclass(frozen=True, init=False)
class TensorInfo:
    """Where a tensor is in its file. ``begin`` and ``end`` are absolute byte offsets, ``code`` is a key of `DTYPES`."""

    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def __init__(self, dtype: torch.dtype | str, shape: tuple[int, ...], begin: int, end: int) -> None:
        """``dtype`` is PyTorch's, or a code of the format."""
        code = dtype if isinstance(dtype, str) else DTYPE_CODES[str(dtype)]
        for name, value in (("code", code), ("shape", shape), ("begin", begin), ("end", end)):
            object.__setattr__(self, name, value)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype, of PyTorch."""
        import torch

        dtype = getattr(torch, self.dtype_name)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def dtype_name(self) -> str:
        """PyTorch's name of the dtype, such as "bfloat16"."""
        return DTYPES[self.code][0]

    @property
    def numel(self) -> int:
        n = 1
        for d in self.shape:
            n *= d
        return n


def _parse_entry(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path}: damaged header: the entry of tensor {name!r} is malformed") from None
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {code!r}, which is not one of {', '.join(DTYPES)}")
    if not all(isinstance(v, int) and 0 <= v < 2**63 for v in (*shape, begin, end)):
        raise CheckpointError(f"{path}: damaged header: the entry of tensor {name!r} is malformed")
    if len(shape) > MOST_DIMENSIONS:
        raise CheckpointError(
            f"{path}: damaged header: tensor {name!r} has {len(shape)} dimensions, at most {MOST_DIMENSIONS} are read"
        )
    info = TensorInfo(code, shape, data_start + begin, data_start + end)
    if end - begin != info.numel * DTYPES[code][1]:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {list(shape)} and {code} can't take {end - begin} bytes"
        )
    return info


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read the tensors' places and the metadata of a safetensors file, and check that they cover the file exactly.

    Raises:
        CheckpointError: the file is missing, not a safetensors file, cut short or longer than its header says, or its
            header is damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            start = f.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 2 <= length <= MAX_HEADER or 8 + length > size:
                raise CheckpointError(f"{path}: not a safetensors file, or cut short ({size} bytes)")
            raw = f.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: is a folder; name the file in it") from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from None
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise TypeError
    except (ValueError, TypeError, RecursionError):
        raise CheckpointError(f"{path}: not a safetensors file: its header is not a JSON object") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: damaged header: the metadata must be texts")
    tensors = {name: _parse_entry(path, name, entry, 8 + length) for name, entry in header.items()}
    position = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            raise CheckpointError(f"{path}: damaged header: tensor {name!r} does not follow its neighbour")
        position = info.end
    if position != size:
        word = "cut short" if position > size else "too long"
        raise CheckpointError(f"{path}: {word}: the header describes {position} bytes, the file has {size}")
    return tensors, metadata


def read_chunks(path: Path, info: TensorInfo, *, once: bool = False) -> Iterator[torch.Tensor]:
    """Yield the tensor's elements, flat and in order, at most `CHUNK` bytes at a time. Each chunk overwrites the last.

    Args:
        once: tell the operating system that the file's pages needn't stay in memory, as they won't be read again soon.

    Raises:
        CheckpointError: the file has meanwhile been removed or cut short, or can't be read.
    """
    import torch

    left = info.end - info.begin
    buffer = bytearray(min(CHUNK, max(left, 1)))
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(info.begin)
            while left:
                view = memoryview(buffer)[: min(left, len(buffer))]
                if file.readinto(view) != len(view):
                    raise CheckpointError(f"{path}: cut short while it was read")
                if once and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), info.end - left, len(view), os.POSIX_FADV_DONTNEED)
                yield torch.frombuffer(view, dtype=info.dtype)
                left -= len(view)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from None


class _Unprotected:
    """A read-only array that NumPy considers writable, so that PyTorch doesn't warn when it is wrapped as a tensor.

    (Suppressing the warning would change the filters of the whole process, including those of other threads.)
    """

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self._array = array  # keep the array alive as long as anything uses its memory
        self.__array_interface__ = array.__array_interface__ | {"data": (array.ctypes.data, False)}


class MappedFile:
    """A memory map of a file. Tensors are views of it, so nothing is read until it is used.

    Raises:
        InsufficientMemoryError: the process may not have so many addresses.
        OSError: the file can't be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open = path.open("rb", buffering=0)  # kept, so that the file can be asked whether it is still the same
        try:
            self._map = mmap.mmap(self._open.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            size = os.fstat(self._open.fileno()).st_size / 1e9
            raise InsufficientMemoryError(
                f"{path}: this process may not have the {size:.1f} GB of addresses for the file, which take no memory by "
                f"themselves; allow more with `ulimit -v`"
            ) from None
        self._state = self._now()

    @cached_property
    def _bytes(self) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.asarray(_Unprotected(np.frombuffer(self._map, dtype=np.uint8))))

    def _now(self) -> tuple[int, int]:
        state = os.fstat(self._open.fileno())
        return state.st_size, state.st_mtime_ns

    def check_unchanged(self) -> None:
        """Check that nobody has written to the file since it was opened.

        Its pages are read as they are used, so such a change gives other results without a word; and where the file was
        cut short, the system ends the process (SIGBUS). A file that was replaced by another of the same name is no
        change: what was opened stays as it was.

        Raises:
            CheckpointError: its size or its time is another.
        """
        (size, _), now = self._state, self._now()
        if now != self._state:
            was = f"it had {size:,} bytes and has {now[0]:,}" if now[0] != size else "its time is another"
            raise CheckpointError(f"{self.path}: was changed while it was in use ({was}); open it again")

    def view(self, infos: Sequence[TensorInfo]) -> torch.Tensor | None:
        """One flat tensor over adjacent tensors of one dtype, without a copy.

        It is None if the tensors are not adjacent, differ in dtype, or are not aligned. The result is a view of the
        file and must not be written to.
        """
        for a, b in itertools.pairwise(infos):
            if a.end != b.begin or a.code != b.code:
                return None
        dtype = infos[0].dtype
        if infos[0].begin % dtype.itemsize:
            return None
        return self._bytes[infos[0].begin : infos[-1].end].view(dtype)

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """One tensor: a view if it is aligned in the file, otherwise a copy."""
        flat = self.view([info])
        if flat is None:
            flat = self._bytes[info.begin : info.end].clone().view(info.dtype)
        return flat.view(info.shape)

    def expect(self, info: TensorInfo) -> None:
        """Have the operating system read the tensor's pages, while the caller goes on with something else."""
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        begin = info.begin // mmap.PAGESIZE * mmap.PAGESIZE
        for position in range(begin, info.end, READ_AHEAD):
            self._map.madvise(mmap.MADV_WILLNEED, position, min(READ_AHEAD, info.end - position))

    def release(self, info: TensorInfo) -> None:
        """Let the operating system drop the tensor's pages from memory. If they are used again, they are read again."""
        if not hasattr(self._map, "madvise"):
            return
        begin = -(-info.begin // mmap.PAGESIZE) * mmap.PAGESIZE
        end = info.end // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def write_header(file: BinaryIO, tensors: dict[str, TensorInfo], metadata: dict[str, str], start: int) -> None:
    """Write the header, padded with spaces so that it ends at byte ``start``."""
    entries: dict[str, object] = {"__metadata__": metadata}
    for name, info in tensors.items():
        entries[name] = {
            "dtype": info.code,
            "shape": list(info.shape),
            "data_offsets": [info.begin - start, info.end - start],
        }
    raw = json.dumps(entries, separators=(",", ":"), sort_keys=False).encode()
    if len(raw) > start - 8:
        raise CheckpointError(f"header of {len(raw)} bytes does not fit into {start - 8}")
    file.seek(0)
    file.write(struct.pack("<Q", start - 8) + raw.ljust(start - 8))


def header_room(names: Sequence[str], metadata: dict[str, str]) -> int:
    """The number of bytes to reserve for the header: a multiple of the page size, so that tensors are aligned."""
    length = 8 + len(json.dumps(metadata)) + sum(len(n) + 128 for n in names) + 256
    return -(-length // 4096) * 4096


if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("mogle_rt reads tensors as little-endian memory; this machine is big-endian")
