"""The images that are judged: what each was drawn from, and which mask, caption and real image belong to it.

What is known of an image comes from the table of `mogle-rt batch`, from the settings within the image, from the record of
jobs beside it, or from its name, in this order.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

from PIL import Image

from mogle_rt.errors import ConfigError, InputError
from mogle_rt.jobs.captions import prompts_of
from mogle_rt.jobs.plan import find_masks
from mogle_rt.jobs.record import JobRecord
from mogle_rt.jobs.settings_read import Seed, read_settings
from mogle_rt.masks.classes import Labels
from mogle_rt.masks.files import FORMATS
from mogle_rt.masks.labels import to_labels
from mogle_rt.masks.orders import Order
from mogle_rt.parquet import ParquetRows
from mogle_rt.values import Range, parsed, quoted

TABLE = "results.parquet"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
_SEED = re.compile(r"(.+)_(\d+)")  # generate's names: the mask's name, then the seed


@dataclass(frozen=True)
class _Line:
    """A row of the table of `mogle-rt batch`, as far as it is needed here."""

    image: str | None
    mask: str | None
    prompt: str | None
    seed: Seed | None
    seconds: Annotated[float, Range(0, 1e9)] | None
    error: str | None


COLUMNS = tuple(field.name for field in fields(_Line))


@dataclass(frozen=True, kw_only=True)
class Row:
    """An image and what belongs to it; None where it isn't known or isn't there.

    Attributes:
        name: the file's, within its folder. image: its path.
        keys: the names by which its mask, caption and real image are looked for, the likeliest first.
        source: what images of the same mask, or of the same prompt where there is no mask, have in common.
        prompt: what it was drawn for; "" for no prompt.
        seed: it was drawn from. seconds: that drawing it took.
        bundle: the hash of the bundle that drew it.
        mask: the file of its mask. inside: whether the mask is within the image.
        real: the real image of the same name.
    """

    name: str
    image: Path
    keys: tuple[str, ...]
    source: str
    prompt: str | None = None
    seed: int | None = None
    seconds: float | None = None
    bundle: str | None = None
    mask: Path | None = None
    inside: bool = False
    real: Path | None = None

    @property
    def group(self) -> str:
        """What images of the same mask, or else of the same prompt, share: these are not independent of each other."""
        return self.mask.stem if self.mask is not None else self.source

    def labels(self, order: Order) -> Labels | None:
        """The mask, uint8 [H, W] of 19 classes; None without one.

        Raises:
            InputError: it can't be read.
        """
        if self.mask is not None:
            return to_labels(self.mask, order=order)
        return read_settings(self.image).labels if self.inside else None


def find_rows(folder: Path, say: Callable[[str], object]) -> list[Row]:
    """The images in a folder and in the folders within it, or those that a table of `mogle-rt batch` names, by name.

    Args:
        folder: written by `mogle-rt generate`, by `mogle-rt batch`, or by anyone.
        say: called with a line on what the folder lacks.

    Raises:
        InputError: there is no such folder, it holds no images, an image is missing or can't be read, or two images are
            of the same mask, prompt and seed.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder" if not folder.exists() else f"{folder}: must be a folder of images"
        )
    table = folder / TABLE
    by_table = table.is_file()
    rows = sorted(_of_table(table, say) if by_table else _of_files(folder, say), key=lambda row: row.name)
    if not rows:
        raise InputError(f"{folder}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    seen: dict[tuple[object, ...], Row] = {}
    for row in rows:
        same: list[tuple[object, ...]] = [(row.image.with_suffix(""),)]
        if row.seed is not None and not by_table:  # the rows of a table may differ in other options
            same.append((row.group, row.prompt, row.seed))
        for what in same:
            other = seen.setdefault(what, row)
            if other is not row:
                raise InputError(
                    f"{other.name} and {row.name}: two images of one mask, prompt and seed; keep one of them in {folder}"
                )
    return rows


def with_masks(rows: Sequence[Row], folder: Path | None, say: Callable[[str], object]) -> list[Row]:
    """The rows with their masks, from files of the same name; None leaves those that are within the images.

    Raises:
        InputError: there is no such folder, two masks have the name of an image, or no mask belongs to an image.
    """
    if folder is None:
        return list(rows)
    files = _by_stem(_masks_in(folder))
    return _matched(rows, files, folder, "mask", say)


def with_real(rows: Sequence[Row], folder: Path, say: Callable[[str], object]) -> list[Row]:
    """The rows with the real images of the same name, as far as there are any.

    Raises:
        InputError: there is no such folder, or two real images have the name of an image.
    """
    files = _by_stem(images_in(folder))
    found = [replace(row, real=_first(row, files)) for row in rows]
    count = sum(row.real is not None for row in found)
    if 0 < count < len(found):
        say(f"{count:,} of {len(found):,} images have a real image of their name in {folder}")
    return found


def with_captions(rows: Sequence[Row], folder: Path | None, number: int, say: Callable[[str], object]) -> list[Row]:
    """The rows with the captions of a folder as their prompts; None leaves the prompts that they were drawn for.

    Args:
        folder: holds a text file for each mask, as docs/guide.md describes for `--mask`.
        number: which caption to take, from 1, where a mask has several.

    Raises:
        InputError: there is no such folder, or no caption belongs to an image.
    """
    if folder is None:
        return list(rows)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of captions")
    texts = [
        next(
            (t for key in row.keys for t in prompts_of(None, [folder / f"{key}.png"], number, lambda _: None) if t),
            None,
        )
        for row in rows
    ]
    _count(rows, [text is not None for text in texts], folder, "caption", say)
    return [replace(row, prompt=text) for row, text in zip(rows, texts, strict=True)]


def images_in(folder: Path) -> list[Path]:
    """The images in a folder and in the folders within it, sorted by name.

    Raises:
        InputError: there is no such folder, or it holds no images.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of images")
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise InputError(f"{folder}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def _masks_in(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of masks")
    return find_masks([folder])


def _of_files(folder: Path, say: Callable[[str], object]) -> Iterator[Row]:
    seeds = JobRecord(folder).drawn_seeds()
    names = [path.relative_to(folder).as_posix() for path in images_in(folder)]
    if drawn := [name for name in names if name in seeds]:  # others are contact sheets, and what no job drew
        if len(drawn) < len(names):
            other = next(name for name in names if name not in seeds)
            say(f"{len(names) - len(drawn):,} pictures in {folder} are left out, as no job drew them: {other}")
        names = drawn
    for name in names:
        yield _row(folder, name, None, None, seeds.get(name), None)


def _of_table(table: Path, say: Callable[[str], object]) -> Iterator[Row]:
    content = ParquetRows(table, "evaluate")
    missing = [name for name in COLUMNS if name not in content.columns]
    if missing:
        raise InputError(f"{table}: has no column {missing[0]}; mogle-rt batch writes {', '.join(COLUMNS)}")
    failed: list[str | None] = []
    for number, cells in content.rows(COLUMNS):
        try:
            line = parsed(_Line, cells, f"row {number}")
        except ConfigError as error:
            raise InputError(f"{table}: {error}") from None
        if line.image is None:
            failed.append(line.error)
            continue
        path = Path(line.image)
        inside = not path.is_absolute() and ".." not in path.parts
        if not inside or not os.path.isfile(table.parent / path):
            raise InputError(f"{table}: names the image {quoted(line.image)}, which isn't there")
        yield _row(table.parent, line.image, line.mask, line.prompt, line.seed, line.seconds)
    if failed:
        say(f"{len(failed):,} of {content.count:,} rows have no image; the first one's error is {quoted(failed[0])}")


def _row(folder: Path, name: str, mask: str | None, prompt: str | None, seed: int | None, seconds: float | None) -> Row:
    image = folder / name
    told = read_settings(image)
    by_name = _SEED.fullmatch(image.stem)
    of_mask = mask or told.mask
    keys = [Path(of_mask).stem if of_mask else None, image.stem, by_name[1] if by_name else None]
    if of_mask:
        source = Path(of_mask).stem
    elif told.mask_png is not None:
        source = hashlib.sha256(told.mask_png.encode()).hexdigest()
    elif told.seed is not None:  # its settings are there and name no mask
        source = f"prompt: {told.prompt}"
    else:
        source = by_name[1] if by_name else image.stem
    return Row(
        name=name,
        image=image,
        keys=tuple(dict.fromkeys(key for key in keys if key)),
        source=source,
        prompt=told.prompt if prompt is None else prompt,
        seed=told.seed if seed is None else seed,
        seconds=seconds,
        bundle=told.bundle_sha256,
        inside=told.mask_png is not None,
    )


def _by_stem(paths: Iterable[Path]) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for path in paths:
        files.setdefault(path.stem, []).append(path)
    return files


def _first(row: Row, files: Mapping[str, list[Path]]) -> Path | None:
    """The file of an image.

    Raises:
        InputError: two files have its name.
    """
    found = next((files[key] for key in row.keys if key in files), [])
    if len(found) > 1:
        raise InputError(
            f"{found[0]} and {found[1]}: two files of the name that belongs to {row.name}; keep one of them"
        )
    return found[0] if found else None


def _matched(
    rows: Sequence[Row], files: Mapping[str, list[Path]], folder: Path, what: str, say: Callable[[str], object]
) -> list[Row]:
    found = [replace(row, mask=_first(row, files), inside=False) for row in rows]
    _count(rows, [row.mask is not None for row in found], folder, what, say)
    return found


def _count(rows: Sequence[Row], there: Sequence[bool], folder: Path, what: str, say: Callable[[str], object]) -> None:
    """Say how many images have no mask or caption.

    Raises:
        InputError: none has one.
    """
    if not any(there):
        names = " or ".join(rows[0].keys)
        raise InputError(f"{folder}: holds no {what} of any image; that of {rows[0].name} must be named {names}")
    if not all(there):
        first = rows[list(there).index(False)].name
        say(f"{there.count(False):,} of {len(rows):,} images have no {what} in {folder}, such as {first}")


def size_of(rows: Sequence[Row]) -> tuple[int, int]:
    """The width and height that all images have.

    Raises:
        InputError: they differ.
    """
    sizes: dict[tuple[int, int], list[str]] = {}
    for row in rows:
        with Image.open(row.image, formats=FORMATS) as image:  # `find_rows` has read its header already
            sizes.setdefault(image.size, []).append(row.name)
    if len(sizes) > 1:
        common, rare = (f(sizes, key=lambda size: len(sizes[size])) for f in (max, min))
        raise InputError(
            f"images differ in size: {len(sizes[common]):,} have {common[0]} x {common[1]} pixels, {sizes[rare][0]} has "
            f"{rare[0]} x {rare[1]}; evaluate them apart"
        )
    return next(iter(sizes))
