"""Parquet files from anyone: what is small on the disk and large in memory is refused before it is read."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest

from mogle_rt.errors import InputError
from mogle_rt.parquet import MOST_ROWS, ROWS_AT_ONCE, ParquetRows

pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow, of the extras batch and evaluate")
from pyarrow import parquet  # noqa: E402

pytestmark = pytest.mark.quick


def test_rows_are_numbered_and_can_begin_anywhere(tmp_path: Path) -> None:
    count = 3 * ROWS_AT_ONCE
    table = pyarrow.table({"a": range(count), "b": [str(n) for n in range(count)]})
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=ROWS_AT_ONCE + 1)
    file = ParquetRows(tmp_path / "t.parquet", "batch")
    assert (file.columns, file.count) == (("a", "b"), count)
    for first in (1, ROWS_AT_ONCE + 1, ROWS_AT_ONCE + 2, count, count + 1):
        assert list(file.rows(["b"], first)) == [(n, {"b": str(n - 1)}) for n in range(first, count + 1)]


def test_far_more_rows_than_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "many.parquet"
    parquet.write_table(pyarrow.table({"a": pyarrow.nulls(10 * MOST_ROWS, pyarrow.string())}), path)
    assert path.stat().st_size < MOST_ROWS
    with pytest.raises(InputError, match=r"says that it has 1,000,000 rows; a file of [\d,]+ bytes can have 100,000$"):
        ParquetRows(path, "batch")


def repeated(path: Path, size: int, rows: int) -> ParquetRows:
    """A file of a kilobyte or so, each of whose rows holds a text of that size."""
    texts = pyarrow.array(["x" * size], pyarrow.large_string())
    cells = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(rows, dtype=np.int32)), texts)
    parquet.write_table(pyarrow.table({"a": ["b"] * rows, "prompt": cells}), path, compression="zstd")
    return ParquetRows(path, "batch")


def test_cells_that_expand_too_far_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mogle_rt.parquet.MOST_BYTES", 1 << 20)
    file = repeated(tmp_path / "deep.parquet", 1 << 20, 2)
    with pytest.raises(
        InputError, match=r"'prompt' expand to 1,048,[\d,]+ bytes; those of a file of [\d,]+ bytes can be "
    ):
        next(file.rows(["prompt"]))
    assert len(list(file.rows(["a"]))) == 2  # columns that nobody asks for may be large


def test_large_cells_are_read_few_at_a_time(tmp_path: Path) -> None:
    file = repeated(tmp_path / "wide.parquet", 8 << 20, ROWS_AT_ONCE)
    before = pyarrow.total_allocated_bytes()
    rows = file.rows(["prompt"])
    next(rows)
    assert pyarrow.total_allocated_bytes() - before < 8 * ROWS_AT_ONCE << 19  # half of what all of them take


def test_a_description_that_ends_the_process_is_refused(tmp_path: Path) -> None:
    """pyarrow 26 ends in signal 6 when it is asked for the columns of this file's row group; that of another process."""
    (tmp_path / "bad.parquet").write_bytes(base64.b64decode(ABORTS))
    file = ParquetRows(tmp_path / "bad.parquet", "evaluate")
    with pytest.raises(InputError, match=r"bad\.parquet: can't be read as Parquet: the description of its row groups"):
        next(file.rows(["a"]))


ABORTS = (
    "UEFSMRUAFRwVHCwVAhUAFQYVBhwYCAEAAAAAAAAAGAgBAAAAAAAAABYAKAgBAAAAAAAAABgIAQAAAAAAAAAREQAAAAIAAAACAQEAAAAAAAAAFQQZLDUAGAZz"
    "Y2hlbWEVAgAVBCUCGAFhABYCGRwZHCYAHBUEGSUGABkYAWEVABYCFpoBFpoBJgg8GAgBAAAAAAAAABgIAQAAAAAAAAAWACgIAQAAAAAAAAAYCAEAAAAAAAAA"
    "EREAGRwVABUAFQIAPBUGGSYAAgAAABaaARYCJggWmgEAKCBwYXJxdWV0LWNwcC1hcnJvdyB2ZXJzaW9uIDI2LjAuMRkcHAAAAKwAAABQQVIx"
)
