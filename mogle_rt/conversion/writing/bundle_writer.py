"""A bundle's file as it is written: tensors one after the other, and the header when all are known."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import torch

from mogle_rt.bundle.bundle import FORMAT, FORMAT_VERSION, PLAIN_VERSION, BundleConfig, hashed_entry
from mogle_rt.bundle.container import TensorInfo, header_room, write_header
from mogle_rt.bundle.storage import WeightStorage, written
from mogle_rt.errors import CheckpointError


class BundleWriter:
    """Tensors into an open file, in the order in which they are added.

    Args:
        file: an empty file.
        config: the bundle's configuration.
        names: the names of all tensors that may be added. storages: all weight formats that the header may name.
        bar: shows how many bytes have been written.
    """

    def __init__(
        self,
        file: BinaryIO,
        config: BundleConfig,
        names: Sequence[str],
        storages: Mapping[str, WeightStorage],
        bar: Any,
    ) -> None:
        self._file, self._bar = file, bar
        self._config_text = json.dumps(config.to_dict(), sort_keys=True)
        self._digest = hashlib.sha256(self._config_text.encode())
        self._start = self._position = header_room(names, self._metadata(storages, "0" * 64))
        self._layout: dict[str, TensorInfo] = {}

    def _metadata(self, storages: Mapping[str, WeightStorage], sha256: str) -> dict[str, str]:
        version = FORMAT_VERSION if storages else PLAIN_VERSION
        metadata = {"format": FORMAT, "format_version": str(version), "config": self._config_text, "sha256": sha256}
        return metadata | ({"weights": written(storages)} if storages else {})

    def add(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], chunks: Iterable[torch.Tensor]) -> None:
        """Write a tensor.

        Args:
            chunks: its elements in order, flat; they are converted to ``dtype``.

        Raises:
            CheckpointError: a number is NaN or infinite, before or after the change of dtype.
        """
        size = math.prod(shape) * dtype.itemsize
        info = self._layout[name] = TensorInfo(dtype, shape, self._position, self._position + size)
        self._digest.update(hashed_entry(name, info))
        self._file.seek(self._position)
        for chunk in chunks:
            self._write_chunk(chunk, dtype, name)
        self._position = info.end

    def _write_chunk(self, chunk: torch.Tensor, dtype: torch.dtype, name: str) -> None:
        converted = chunk.to(dtype)
        raw = converted.view(torch.uint8).numpy()
        if _all_zero(raw):
            self._file.seek(raw.nbytes, 1)  # a hole stays a hole: nothing to write
        else:
            if dtype.is_floating_point:
                require_finite(name, converted, chunk)
            self._file.write(raw.data)
        self._digest.update(raw.data)
        self._bar.update(raw.nbytes)

    def finish(self, storages: Mapping[str, WeightStorage]) -> None:
        """Write the header, which says how these layers are stored. Nothing is added afterwards."""
        self._file.truncate(self._position)
        self._digest.update(written(storages).encode())
        write_header(self._file, self._layout, self._metadata(storages, self._digest.hexdigest()), self._start)


def require_finite(name: str, converted: torch.Tensor, source: torch.Tensor) -> None:
    """Values of a tensor that were converted from ``source``.

    Raises:
        CheckpointError: NaN or infinite values, there already or by the conversion.
    """
    if not _finite(converted):
        after = f" once in {converted.dtype}" if _finite(source) else ""
        raise CheckpointError(f"tensor {name!r} holds NaN or infinite values{after}")


def _finite(values: torch.Tensor) -> bool:
    if values.dtype == torch.float8_e4m3fn:  # has no minimum in PyTorch
        values = values.float()
    return all(
        math.isfinite(bound.item()) for bound in values.aminmax()
    )  # NaN passes through: 20x faster than isfinite


def _all_zero(raw: np.ndarray[Any, np.dtype[np.uint8]]) -> bool:
    words = raw.nbytes // 8 * 8
    return not (np.bitwise_or.reduce(raw[:words].view(np.uint64)) if words else 0) and not raw[words:].any()
