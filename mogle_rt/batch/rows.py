"""Rows: what one image is drawn from. They come from a table, from a folder of masks, or from MM-CelebA-HQ's folders."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mogle_rt.arguments import prompt_list
from mogle_rt.batch.options import (
    ID,
    KNOWN,
    MASK,
    OPTIONS,
    PROMPT,
    SEED,
    check_columns,
    is_empty,
    read_id,
    read_options,
    read_seed,
)
from mogle_rt.batch.tables import PARQUET, Table
from mogle_rt.errors import InputError, MogleError
from mogle_rt.jobs.captions import captions_of, chosen_caption
from mogle_rt.jobs.plan import digest_of, find_masks, short_digest
from mogle_rt.values import quoted

MOST_SEED = 2**63 - 3  # as an image's settings may hold it
DERIVED_SEEDS = 2**32  # seeds that follow from ids are below this: short enough to type, and seldom the same
MASK_FOLDERS = ("mask", "masks")  # of a data set's folder: MM-CelebA-HQ has mask/ beside text/ and image/


@dataclass(frozen=True)
class MaskSource:
    """Where a mask is.

    Attributes:
        path: the mask's file, or the Parquet file that holds it.
        row: its row in that file, from 1; None for a file of its own.
        name: the name of the mask's file, if it is known.
    """

    path: Path
    row: int | None
    name: Path | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one image is drawn from.

    Attributes:
        place: where it stands, for messages: "row 3", or a mask's path.
        id: tells it from all others. Its image's name begins with it.
        seed: of the noise.
        mask: None without a mask.
        digest: of the mask; "" without one.
        options: of the call, where they are the row's own; sorted by their names.
        error: why there can't be an image; then the other attributes may be empty.
    """

    place: str
    id: str = ""
    seed: int = 0
    prompt: str = ""
    mask: MaskSource | None = None
    digest: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    error: str | None = None


def read_rows(source: Path, seed: int, caption: int, say: Callable[[str], object]) -> list[Row]:
    """Read all rows. Masks are read for their digests only; whether they can be decoded isn't known yet.

    Args:
        source: a file as `Table` reads it, a folder of such Parquet files, a folder of masks, or a data set's folder with
            masks in ``mask/``.
        seed: changes all seeds that follow from ids.
        caption: which caption is the prompt, from 1, where a mask has several.
        say: called with lines for the user.

    Raises:
        InputError: there are no rows, a file is damaged, a column is missing, or two rows have the same id. A row that is
            wrong by itself is a row with an error.
    """
    if not source.is_dir():
        rows = list(_of_table(Table.open(source), caption, say))
    elif tables := sorted(p for p in source.iterdir() if p.suffix.lower() == PARQUET and not p.name.startswith(".")):
        rows = [row for path in tables for row in _of_table(Table.open(path), caption, say, named=len(tables) > 1)]
    else:
        inner = [source / name for name in MASK_FOLDERS if (source / name).is_dir()]
        try:
            masks = list(find_masks([source]))
        except InputError:
            if not inner:
                raise
            masks = list(find_masks(inner[:1]))
        rows = list(_of_masks(masks, caption, say))
    rows = _with_ids(rows)
    return [row if row.seed >= 0 else replace(row, seed=derived_seed(row.id, seed)) for row in rows]


def derived_seed(name: str, seed: int) -> int:
    """The seed that follows from an id, and from the seed of the whole job."""
    digest = hashlib.sha256(f"{seed}:{name}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little") % DERIVED_SEEDS


_NO_SEED = -1  # of a row whose seed is to follow from its id


def _of_table(table: Table, caption: int, say: Callable[[str], object], *, named: bool = False) -> Iterator[Row]:
    unknown = check_columns(table.path, table.columns)
    if unknown:
        say(f"{table.path}: columns that mean nothing here are left out: {', '.join(map(quoted, unknown))}")
    told = False
    for number, cells in table.rows([name for name in table.columns if name in KNOWN]):
        place = f"{table.path.name} row {number}" if named else f"row {number}"
        several = cells[PROMPT]
        if isinstance(several, list) and len(several) > 1 and not told:
            say(f"prompts have up to {len(several)} captions; number {caption} is taken, --caption N chooses another")
            told = True
        yield _of_cells(table.path, number, cells, place, caption)


def _of_cells(table: Path, number: int, cells: dict[str, Any], place: str, caption: int) -> Row:
    row = Row(place=place, seed=_NO_SEED)
    try:
        if not is_empty(cells.get(ID)):
            row = replace(row, id=read_id(cells[ID]))
        if not is_empty(cells.get(SEED)):
            row = replace(row, seed=read_seed(cells[SEED], MOST_SEED))
        row = replace(row, prompt=_prompt(cells[PROMPT], caption, "the row"))
        mask, content = _mask_of(table, number, cells[MASK])
        row = replace(row, mask=mask, options=read_options({name: cells.get(name) for name in OPTIONS}))
        if mask is not None:
            row = replace(row, digest=short_digest(content) if content is not None else _digest(mask.path))
    except MogleError as error:
        return replace(row, error=str(error))
    return row


def _prompt(value: Any, caption: int, whose: object) -> str:
    if is_empty(value):
        return ""
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        value = chosen_caption(value, caption, whose)
    if not isinstance(value, str):
        raise InputError(f"prompt must be a text, or a list of captions, got {quoted(value)}")
    return prompt_list(value, None, None)[0]


def _mask_of(table: Path, number: int, value: Any) -> tuple[MaskSource | None, bytes | None]:
    """Where a cell's mask is; and its content, where the cell holds that: as bytes, or with its path as Hugging Face's
    data sets have it.
    """
    name = None
    if isinstance(value, dict) and set(value) <= {"bytes", "path"}:
        name = value.get("path")
        value = value.get("bytes") if value.get("bytes") is not None else name
    if is_empty(value):
        return None, None
    if isinstance(value, bytes):
        return MaskSource(table, number, Path(Path(name).name) if isinstance(name, str) and name else None), value
    if not isinstance(value, str) or "\0" in value:
        raise InputError(f"mask must be a path or the bytes of a file, got {quoted(value)}")
    path = table.parent / value
    return MaskSource(path, None, Path(path.name)), None


def _of_masks(masks: Sequence[Path], caption: int, say: Callable[[str], object]) -> Iterator[Row]:
    most = empty = 0
    for path in masks:
        row = Row(place=str(path), id=path.stem, seed=_NO_SEED, mask=MaskSource(path, None, Path(path.name)))
        try:
            captions = captions_of(path)
            empty += not captions
            most = max(most, len(captions))
            row = replace(row, digest=_digest(path), prompt=_prompt(captions, caption, path) if captions else "")
        except MogleError as error:
            row = replace(row, error=str(error))
        yield row
    if most > 1:
        say(f"masks have up to {most} captions; number {caption} is the prompt, --caption N chooses another")
    if empty:
        say(f"{empty:,} of {len(masks):,} masks have no prompt, and are drawn from the mask alone")


def _digest(path: Path) -> str:
    try:
        return digest_of(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror or error}") from None


def _with_ids(rows: list[Row]) -> list[Row]:
    """The rows, all with an id. Where none is given it is the digest of the row; equal rows are numbered.

    Raises:
        InputError: two rows have the same id.
    """
    seen: Counter[str] = Counter()
    named = []
    for row in rows:
        if not row.id:
            content = [row.digest, row.prompt, None if row.seed == _NO_SEED else row.seed, row.options, row.error]
            own = short_digest(json.dumps(content).encode())
            seen[own] += 1
            row = replace(row, id=own if seen[own] == 1 else f"{own}-{seen[own]}")
        named.append(row)
    places: dict[str, str] = {}
    for row in named:
        other = places.setdefault(row.id, row.place)
        if other != row.place:
            raise InputError(f"{other} and {row.place} have the same id {quoted(row.id)}; each needs one of its own")
    return named
