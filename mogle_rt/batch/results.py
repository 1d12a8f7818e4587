"""The table of results: one row for each row of the input, in its order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mogle_rt.bundle.files import atomic_write
from mogle_rt.errors import OutputError
from mogle_rt.jobs.record import JobRecord

if TYPE_CHECKING:
    import pyarrow

    from mogle_rt.batch.rows import Row

NAME = "results.parquet"
NOT_DRAWN = "not drawn yet: the job was stopped"


def write_results(
    record: JobRecord,
    settings: Mapping[str, Any],
    rows: Sequence[Row],
    paths: Mapping[str, Path],
    errors: Mapping[str, str],
) -> Path:
    """Write the table beside the images, if it isn't there already as it would be.

    Its columns are ``id``, ``image`` (the file's name, null without an image), ``mask`` (the file's name), ``prompt``,
    ``seed``, ``settings`` (JSON: those of the job, and over them the row's own), ``hash`` (of all that the image follows
    from), ``seconds`` (null if they aren't known) and ``error`` (null if there is none).

    Args:
        record: of the folder, as it is by now.
        settings: of the job, see `mogle_rt.jobs.record.job_settings`.
        rows: of the input.
        paths: of the images, by the rows' ids.
        errors: why rows have no image, by their ids.

    Returns:
        The table's path.

    Raises:
        OutputError: it can't be written.
    """
    import pyarrow
    from pyarrow import parquet

    columns: dict[str, list[Any]] = {name: [] for name in _schema().names}
    for row in rows:
        path = paths.get(row.id)
        there = path is not None and path.exists()
        error = None if there else errors.get(row.id, NOT_DRAWN)
        values = {
            "id": row.id,
            "image": path.name if path is not None and there else None,
            "mask": str(row.mask.name) if row.mask is not None and row.mask.name is not None else None,
            "prompt": row.prompt,
            "seed": max(0, row.seed),
            "settings": json.dumps({**settings, **dict(row.options)}),
            "hash": row_hash(settings, row),
            "seconds": record.seconds(path) if path is not None and there else None,
            "error": error,
        }
        for name, value in values.items():
            columns[name].append(value)
    table, path = pyarrow.table(columns, schema=_schema()), record.folder / NAME
    try:
        if path.exists() and parquet.read_table(path).equals(table):
            return path
    except (pyarrow.ArrowException, OSError):  # not such a table: it is replaced
        pass
    with atomic_write(path) as file:
        try:
            parquet.write_table(table, file)
        except OSError as error:
            raise OutputError(f"{path}: can't be written: {error.strerror or error}") from None
    return path


def row_hash(settings: Mapping[str, Any], row: Row) -> str:
    """The SHA-256 of all that a row's image follows from: bundle, settings, options, mask, prompt and seed."""
    content = [dict(settings), row.options, row.digest, row.prompt, row.seed]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _schema() -> pyarrow.Schema:
    import pyarrow

    texts = dict.fromkeys(("id", "image", "mask", "prompt"), pyarrow.string())
    numbers = {"seed": pyarrow.int64()}
    rest = {
        "settings": pyarrow.string(),
        "hash": pyarrow.string(),
        "seconds": pyarrow.float64(),
        "error": pyarrow.string(),
    }
    return pyarrow.schema(texts | numbers | rest)
