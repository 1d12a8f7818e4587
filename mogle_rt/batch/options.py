"""Columns: which ones a table of rows may have, and what their cells become: options of the pipeline's call."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mogle_rt.arguments import check_options
from mogle_rt.errors import InputError
from mogle_rt.masks.orders import order_table
from mogle_rt.values import quoted

MASK, PROMPT, ID, SEED = "mask", "prompt", "id", "seed"
NEEDED = (MASK, PROMPT)
# Arguments of the call that no table can hold, and what to do instead.
NOT_A_COLUMN = {
    "num_images_per_prompt": "write a row for each image",
    "negative_prompt": "FLUX.1-dev is distilled and has none",
    "generator": "the column seed gives each row its noise",
    "latents": "the column seed gives each row its noise",
    "prompt_embeds": "the column prompt holds texts",
    "pooled_prompt_embeds": "the column prompt holds texts",
    "output_type": "images are written as files",
    "steps": "the column is num_inference_steps",
    "guidance": "the column is guidance_scale",
}


def _whole(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    number = value if isinstance(value, (int, float)) else float(json.loads(value))
    if not math.isfinite(number):
        raise ValueError
    return number


def _real(value: Any) -> float:
    return float(_number(value))


def _pair(value: Any) -> tuple[float, float]:
    rows, columns = json.loads(value) if isinstance(value, str) else value
    return _number(rows), _number(columns)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _order(value: Any) -> str | tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else [_text(name) for name in value]
    return names[0] if len(names) == 1 else tuple(names)


OPTIONS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "num_inference_steps": ("a whole number", _whole),
    "guidance_scale": ("a number", _real),
    "condition_scale": ("a number", _real),
    "height": ("a whole number", _whole),
    "width": ("a whole number", _whole),
    "mask_order": ("a name, or the classes' names with commas between", _order),
    "position_delta": ("two numbers, as [0, 8]", _pair),
    "position_scale": ("a number", _real),
    "max_sequence_length": ("a whole number", _whole),
    "mask_posterior": ("a text", _text),
}
"""What a column that is an option of the call holds, and how a cell is read. Cells of a CSV file are texts."""

KNOWN = (*NEEDED, ID, SEED, *OPTIONS)


def check_columns(path: Path, columns: Sequence[str]) -> list[str]:
    """Check a table's columns.

    Returns:
        Those that mean nothing here.

    Raises:
        InputError: a needed column is missing; or one is an argument that no table can hold, or looks like a misspelt
            option.
    """
    for name in NEEDED:
        if name not in columns:
            raise InputError(f"{path}: has no column {name!r}; it has {', '.join(map(quoted, columns[:20]))}")
    for name in columns:
        if name in NOT_A_COLUMN:
            raise InputError(f"{path}: {name!r} can't be a column: {NOT_A_COLUMN[name]}")
    unknown = [name for name in columns if name not in KNOWN]
    for name in unknown:
        near = difflib.get_close_matches(name, KNOWN, 1, cutoff=0.8)
        if near:
            raise InputError(f"{path}: there is no option {name!r}; rename the column to {near[0]!r}, or remove it")
    return unknown


def read_options(cells: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The options of a row's call, sorted by their names. An empty cell means what the whole job has.

    Raises:
        InputError, MaskError: one can't be read, or is out of range.
    """
    options = {}
    for name, (kind, read) in OPTIONS.items():
        value = cells.get(name)
        if is_empty(value):
            continue
        try:
            options[name] = read(value)
        except (ValueError, TypeError):
            raise InputError(f"{name} must be {kind}, got {quoted(value)}") from None
    check_call(options)
    return tuple(sorted(options.items()))


def check_call(options: Mapping[str, Any]) -> None:
    """Check options of the call, each of which may be missing or None.

    Raises:
        InputError, MaskError: one is unknown, or out of range.
    """
    for name in options:
        if name not in OPTIONS:
            raise InputError(f"there is no option {name!r}; there are {', '.join(OPTIONS)}")
    given = {name: value for name, value in options.items() if value is not None}
    order_table(given.pop("mask_order", "celebamask"))
    check_options(**given)


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing: null, an empty text, or NaN, which is what pandas writes for a missing number."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def read_seed(value: Any, most: int) -> int:
    """A seed.

    Raises:
        InputError: it is no whole number from 0 to ``most``.
    """
    try:
        seed = int(value) if isinstance(value, str) and value.strip().isdecimal() else _whole(value)
    except (ValueError, TypeError):
        seed = -1
    if not 0 <= seed <= most:
        raise InputError(f"seed must be a whole number from 0 to {most}, got {quoted(value)}")
    return seed


def read_id(value: Any) -> str:
    """The name of a row, which is the beginning of its image's file name.

    Raises:
        InputError: it can't be that.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    usable = isinstance(value, str) and value.isprintable() and not value.startswith(".")
    if not usable or set(value) & set('/\\:*?"<>|') or len(value.encode(errors="replace")) > 200:
        raise InputError(f"id must be a text of at most 200 bytes that can name a file, got {quoted(value)}")
    return str(value)
