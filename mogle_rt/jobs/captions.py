"""The texts that belong to masks: given, in files beside them, or as MM-CelebA-HQ keeps them."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from mogle_rt.errors import InputError
from mogle_rt.values import read_json


def prompts_of(
    given: list[str] | None, masks: list[Path | None], caption: int, say: Callable[[str], object]
) -> list[str]:
    """The prompt of each mask.

    Args:
        given: one prompt for all masks or one for each; None reads the texts that belong to the masks.
        masks: the masks' paths; None stands for an image without a mask.
        caption: which caption to use, from 1, if a mask has several.
        say: called with a line that says which caption is used, if masks have several.

    Raises:
        InputError: prompts are not text, their number is wrong, or a mask has fewer captions.
    """
    if given is None:
        every = [captions_of(mask) if mask else [] for mask in masks]
        several = [captions for captions in every if len(captions) > 1]
        if several:
            most = max(map(len, several))
            say(f"masks have up to {most} captions; number {caption} is the prompt, --caption N chooses another")
        return [chosen_caption(captions, caption, mask) for captions, mask in zip(every, masks, strict=True)]
    for prompt in given:
        if any("\ud800" <= c <= "\udfff" for c in prompt):  # Python represents bytes that are not text like this
            raise InputError(f"--prompt must be UTF-8 text, got {prompt!r}")
    if len(given) not in (1, len(masks)):
        raise InputError(f"--prompt must be given once or once for each of {len(masks)} masks, got {len(given)}")
    return given * len(masks) if len(given) == 1 else given


def chosen_caption(captions: list[str], number: int, whose: object) -> str:
    """One of the captions, numbered from 1; the empty text where there are none.

    Args:
        whose: names the mask in messages.

    Raises:
        InputError: there is none of this number.
    """
    if not captions:
        return ""
    if not 1 <= number <= len(captions):
        has = "1 caption" if len(captions) == 1 else f"{len(captions)} captions"
        raise InputError(f"--caption {number}: {whose} has {has}; give a number from 1 to {len(captions)}")
    return captions[number - 1]


def captions_of(mask: Path) -> list[str]:
    """The captions that belong to a mask: from a text file beside it, or else from where MM-CelebA-HQ has them.

    That data set has masks in ``mask/N.png`` and ten captions of each face, either one per line in ``text/N.txt`` or as
    a list in ``text.json`` under the name of the photograph, ``N.jpg``. Each line of a text file is one caption.
    """
    folder = mask.resolve().parent.parent
    found = (
        _text_of(mask.with_suffix(".txt")).splitlines()
        or _text_of(folder / "text" / f"{mask.stem}.txt").splitlines()
        or _captions(folder / "text.json", mask.stem)
    )
    return [line.strip() for line in found if line.strip()]


def _text_of(path: Path) -> str:
    """The contents of a text file, or an empty text if there is no file."""
    try:
        # Some editors put a byte order mark first. `Path.is_file` raises an error where a name is too long.
        return path.read_text("utf-8-sig").strip() if os.path.isfile(path) else ""
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: must be UTF-8 text: {error}") from None


def _captions(path: Path, stem: str) -> list[str]:
    """The captions of a face in MM-CelebA-HQ's ``text.json``; or none if there is no such file or entry."""
    entries = _entries(path)
    value = next((entries[name] for name in (f"{stem}.jpg", f"{stem}.png", stem) if name in entries), [])
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise InputError(f"{path}: the entry of {stem!r} must be a text or a list of texts, got {str(value)[:60]!r}")
    return captions


@cache
def _entries(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        entries = read_json(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(entries, dict):
        raise InputError(f"{path}: must hold a JSON object of captions by file name, holds {type(entries).__name__}")
    return entries
