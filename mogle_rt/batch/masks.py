"""The masks of rows: fetched from their files or out of Parquet files, and checked before anything is drawn."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from mogle_rt.batch.options import MASK
from mogle_rt.batch.rows import MaskSource, Row
from mogle_rt.batch.tables import parquet_cells
from mogle_rt.errors import InputError, MaskError, MogleError
from mogle_rt.masks.labels import to_labels

AT_ONCE = 64  # masks in memory while they are checked
Shape: TypeAlias = tuple[int, ...] | None


class MaskReader:
    """Fetches masks. Parquet files are read onwards from the last mask, so rows are best asked for in their order."""

    def __init__(self) -> None:
        self._cells: tuple[Path, Iterator[tuple[int, Any]]] | None = None
        self._next = 0

    def __call__(self, source: MaskSource) -> Path | bytes:
        """The mask as `mogle_rt.masks.to_labels` takes it.

        Raises:
            InputError: the Parquet file can't be read, or has changed.
        """
        if source.row is None:
            return source.path
        if self._cells is None or self._cells[0] != source.path or source.row < self._next:
            self._cells = source.path, parquet_cells(source.path, MASK, source.row)
        for number, cell in self._cells[1]:
            self._next = number + 1
            if number == source.row:
                content = cell.get("bytes") if isinstance(cell, dict) else cell
                if isinstance(content, bytes):
                    return content
                break
        self._cells = None
        raise InputError(f"{source.path}: row {source.row} holds no mask any more")


def check_masks(rows: Sequence[Row], order: Any) -> dict[str, Shape | MogleError]:
    """Decode the masks of rows.

    Args:
        order: of the labels, for rows that don't say it themselves.

    Returns:
        By the rows' ids, the height and width of the mask, None where there is none, or why it can't be read.
    """

    def decode(mask: Path | bytes | MogleError | None, options: Mapping[str, Any]) -> Shape | MogleError:
        if mask is None or isinstance(mask, MogleError):
            return mask
        try:
            return to_labels(mask, order=options.get("mask_order", order)).shape
        except FileNotFoundError:
            return MaskError(f"{mask!r}: no such file")
        except MogleError as error:
            return error

    def fetch(row: Row) -> Path | bytes | MogleError | None:
        try:
            return None if row.mask is None else reader(row.mask)
        except MogleError as error:
            return error

    reader, waiting = MaskReader(), iter(rows)
    shapes: dict[str, Shape | MogleError] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while part := list(islice(waiting, AT_ONCE)):
            masks = [fetch(row) for row in part]
            options = [dict(row.options) for row in part]
            shapes |= dict(zip([row.id for row in part], pool.map(decode, masks, options), strict=True))
    return shapes
