"""Tables of rows in files: CSV, JSON lines and Parquet, read as columns and cells, whatever they mean."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mogle_rt.errors import InputError
from mogle_rt.parquet import ParquetRows
from mogle_rt.values import quoted, read_json

CSV, PARQUET = ".csv", ".parquet"
JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = (CSV, *JSON_LINES, PARQUET)


@dataclass(frozen=True)
class Table:
    """A file of rows.

    Attributes:
        path: the file.
        columns: their names, each once.
    """

    path: Path
    columns: tuple[str, ...]

    @classmethod
    def open(cls, path: Path) -> Table:
        """Read a file's columns.

        Raises:
            InputError: the file is missing or damaged, it has no rows, or two columns have one name.
        """
        suffix = path.suffix.lower()
        if suffix not in SUFFIXES:
            raise InputError(f"{path}: rows are read from {', '.join(SUFFIXES)}, not {suffix or 'no suffix'!r}")
        try:
            names = list(_COLUMNS[suffix](path))
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except OSError as error:
            raise InputError(f"{path}: can't be read: {error.strerror or error}") from None
        if not names:
            raise InputError(f"{path}: holds no rows")
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"{path}: has two columns named {quoted(name)}")
        return cls(path, tuple(names))

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each row's number, as the file counts its rows from 1, and its cells in these columns; None where one is empty.

        Raises:
            InputError: a row can't be read.
        """
        if self.path.suffix.lower() == PARQUET:
            yield from ParquetRows(self.path, "batch").rows(columns)
            return
        for number, cells in _json_rows(self.path) if self.path.suffix.lower() in JSON_LINES else _csv_rows(self.path):
            yield number, {name: cells.get(name) for name in columns}


def parquet_cells(path: Path, column: str, first: int) -> Iterator[tuple[int, Any]]:
    """The cells of one column from a row on, counted from 1. Few rows are in memory at once.

    Raises:
        InputError: the file can't be read.
    """
    for number, cells in ParquetRows(path, "batch").rows([column], first):
        yield number, cells[column]


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    head: list[str] | None = None
    number = 0
    for line, cells in _csv_lines(path):
        if head is None:
            head = cells
            continue
        if not cells:  # an empty line
            continue
        if len(cells) != len(head):
            raise InputError(
                f"{path}: line {line} has {len(cells)} cells, and the first line names {len(head)} columns"
            )
        number += 1
        yield number, {name: cell or None for name, cell in zip(head, cells, strict=True)}


def _csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:  # some editors put a byte order mark first
        reader = csv.reader(file, strict=True)
        try:
            for cells in reader:
                yield reader.line_num, cells
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: must be UTF-8 text: {error}") from None
        except csv.Error as error:
            raise InputError(f"{path}: line {reader.line_num} can't be read: {error}") from None


def _csv_columns(path: Path) -> list[str]:
    lines = _csv_lines(path)
    head = next(lines, (0, []))[1]
    return head if next(lines, None) is not None else []


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    with path.open("rb") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            number += 1
            try:
                cells = read_json(text.decode("utf-8-sig"))
            except ValueError as error:
                raise InputError(f"{path}: line {line} can't be read as JSON: {error}") from None
            if not isinstance(cells, dict):
                raise InputError(f"{path}: line {line} must hold a JSON object, holds {quoted(cells)}")
            yield number, cells


def _json_columns(path: Path) -> list[str]:
    names: dict[str, None] = {}
    for _, cells in _json_rows(path):
        names |= dict.fromkeys(cells)
    return list(names)


def _parquet_columns(path: Path) -> list[str]:
    file = ParquetRows(path, "batch")
    return list(file.columns) if file.count else []


_COLUMNS = {CSV: _csv_columns, PARQUET: _parquet_columns} | dict.fromkeys(JSON_LINES, _json_columns)
