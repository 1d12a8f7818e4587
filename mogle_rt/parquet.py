"""Parquet files from anyone, read a few rows at a time.

A Parquet file of some kilobytes can hold a billion rows, or rows of gigabytes, because equal values are stored once. So what
it would expand to is looked at before anything is read. Only pyarrow's descriptions of row groups tell it, and there some
damaged files end the process: pyarrow lets errors of C++ pass through Python. So another process looks at them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from mogle_rt.errors import InputError
from mogle_rt.installed import install_command
from mogle_rt.values import quoted

MOST_ROWS = 100_000  # of any file; a larger one can have as many rows as bytes
MOST_BYTES = 64 << 20  # that the columns of a row group expand to, in any file; in a larger one 100 times its size
ROWS_AT_ONCE = 64  # whose masks may be in the file
BYTES_AT_ONCE = 128 << 20  # of these rows, if each holds the largest value
SECONDS = 60  # in which the other process must have looked at a file
_LOOK = """
import json, sys
from pyarrow import parquet
metadata = parquet.ParquetFile(sys.argv[1]).metadata
groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
print(json.dumps([[g.num_rows, [
    [c.path_in_schema, c.total_uncompressed_size] for c in map(g.column, range(g.num_columns))
]] for g in groups]))
"""


class ParquetRows:
    """A Parquet file.

    Args:
        path: the file.
        extra: of the package's extras, the one that installs pyarrow.

    Attributes:
        path: the file.
        columns: the names of its columns.
        count: how many rows it has.

    Raises:
        InputError: pyarrow isn't installed; or the file is missing or damaged, or has far more rows than bytes.
    """

    def __init__(self, path: Path, extra: str) -> None:
        try:
            from pyarrow import ArrowException, parquet
        except ImportError:
            raise InputError(f"{path}: reading it needs pyarrow; install it with {install_command(extra)}") from None
        self.path = path
        try:
            self._file = parquet.ParquetFile(path)
            self.columns: tuple[str, ...] = tuple(self._file.schema_arrow.names)
            self._state = path.stat()
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except (ArrowException, OSError, ValueError) as error:
            raise InputError(f"{path}: can't be read as Parquet: {' '.join(str(error).split())[:300]}") from None
        self.count: int = self._file.metadata.num_rows
        most = max(MOST_ROWS, self._state.st_size)
        if not 0 <= self.count <= most:
            raise InputError(
                f"{path}: says that it has {self.count:,} rows; a file of {self._state.st_size:,} bytes can have {most:,}"
            )

    def rows(self, columns: Sequence[str], first: int = 1) -> Iterator[tuple[int, dict[str, Any]]]:
        """The number of each row, from ``first`` on, and its cells in these columns. Few rows are in memory at once.

        Raises:
            InputError: the rest can't be read, or expands to far more than the file's size.
        """
        import pyarrow

        number, groups, largest = 0, list[int](), 1
        described = _groups(self.path, self._state.st_size, self._state.st_mtime_ns)
        for index, (count, chunks) in enumerate(described):  # whole groups before the first row needn't be read
            if not groups and number + count < first:
                number += count
                continue
            groups.append(index)
            largest = max(largest, self._expanded(chunks, columns))
        at_once = max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE // largest))
        try:
            for batch in self._file.iter_batches(at_once, row_groups=groups, columns=list(columns), use_threads=False):
                if number + batch.num_rows < first:
                    number += batch.num_rows
                    continue
                for cells in batch.to_pylist():
                    number += 1
                    if number >= first:
                        yield number, cells
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise InputError(
                f"{self.path}: can't be read after row {number}: {' '.join(str(error).split())[:300]}"
            ) from None

    def _expanded(self, chunks: Sequence[tuple[str, int]], columns: Sequence[str]) -> int:
        """The bytes that some columns of a row group expand to, where equal values count once.

        Raises:
            InputError: they are far more than the file's.
        """
        total = sum(size for name, size in chunks if name.partition(".")[0] in columns)
        most = max(MOST_BYTES, 100 * self._state.st_size)
        if not 0 <= total <= most:
            names = ", ".join(map(quoted, columns[:8]))
            raise InputError(
                f"{self.path}: {names} expand to {total:,} bytes; those of a file of {self._state.st_size:,} bytes can be "
                f"{most:,}"
            )
        return total


@lru_cache(maxsize=32)
def _groups(path: Path, size: int, changed: int) -> list[tuple[int, list[tuple[str, int]]]]:
    """Of each row group, how many rows it has, and the columns' names with the bytes that they expand to.

    Args:
        size, changed: of the file. They tell it from one that was there before.

    Raises:
        InputError: the file is damaged.
    """
    try:
        command = [sys.executable, "-P", "-c", _LOOK, str(path.absolute())]
        looked = subprocess.run(command, capture_output=True, timeout=SECONDS, check=True)
        found: list[tuple[int, list[tuple[str, int]]]] = json.loads(looked.stdout)
    except (subprocess.SubprocessError, OSError, ValueError):
        raise InputError(f"{path}: can't be read as Parquet: the description of its row groups is damaged") from None
    return found
