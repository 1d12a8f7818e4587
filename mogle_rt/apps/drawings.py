"""Which images ``mogle-rt generate`` makes: of what mask and prompt, from what seed, into what file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from mogle_rt.apps.image_files import check_suffix
from mogle_rt.errors import InputError, OutputError

MASK_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".npy"}


class Drawing(NamedTuple):
    """An image to make: its mask, prompt, seed and file."""

    mask: Path | None
    prompt: str
    seed: int
    path: Path


Existing = Literal["refuse", "replace", "skip"]


def plan(
    masks: list[Path | None], prompts: list[str] | None, num_images: int, seed: int, output: Path, existing: Existing
) -> list[Drawing]:
    """Every image, checked before any work is done.

    Args:
        masks: None where an image has none.
        prompts: one for all masks or one for each; None reads the text files beside them.
        num_images: of each mask.
        seed: the first image's; the next have the next.
        output: a file, or a folder.
        existing: what happens where a file is there already; "skip" leaves out what an interrupted job has drawn.

    Raises:
        InputError: prompts that are no text, or too many or few. OutputError: a file is there or can't be written.
    """
    drawings = list(_drawings(masks, _prompts(prompts, masks), num_images, seed, output))
    _check_writable(output)
    if existing == "replace":
        return drawings
    new = [drawing for drawing in drawings if not drawing.path.exists()]
    if existing == "refuse" and len(new) < len(drawings):
        taken = next(drawing.path for drawing in drawings if drawing.path.exists())
        raise OutputError(f"{taken}: exists already; choose another name, --overwrite or --skip-existing")
    return new


def find_masks(paths: list[Path]) -> Iterator[Path]:
    """Files, those of folders, and folders that are masks themselves: of part files, as CelebAMask-HQ has them.

    Raises:
        InputError: a folder holds none.
    """
    from mogle_rt.masks.planes import part_files

    for path in (Path(os.path.expanduser(path)) for path in paths):
        if not path.is_dir() or part_files(path):
            yield path
            continue
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in MASK_SUFFIXES and not p.name.startswith("."))
        if not found:
            raise InputError(f"{path}: a folder without masks ({', '.join(sorted(MASK_SUFFIXES))})")
        yield from found


def batches(
    drawings: list[Drawing], batch_size: int, shapes: Mapping[Path | None, tuple[int, int] | None]
) -> Iterator[list[Drawing]]:
    """Drawings in their order, up to ``batch_size`` at once, all of whose masks have one shape (height and width, or None
    where there is no mask): an image's size must not depend on its neighbours."""
    batch: list[Drawing] = []
    for drawing in drawings:
        if batch and (len(batch) == batch_size or shapes[drawing.mask] != shapes[batch[0].mask]):
            yield batch
            batch = []
        batch.append(drawing)
    if batch:
        yield batch


def _prompts(given: list[str] | None, masks: list[Path | None]) -> list[str]:
    """One for each mask."""
    if given is None:
        return [_text_of(mask.with_suffix(".txt")) if mask else "" for mask in masks]
    for prompt in given:
        if any("\ud800" <= c <= "\udfff" for c in prompt):  # how Python keeps bytes that are no text
            raise InputError(f"--prompt must be UTF-8 text, got {prompt!r}")
    if len(given) not in (1, len(masks)):
        raise InputError(f"--prompt must be given once or once for each of {len(masks)} masks, got {len(given)}")
    return given * len(masks) if len(given) == 1 else given


def _text_of(path: Path) -> str:
    """What a text file says; nothing where there is none."""
    try:
        return path.read_text("utf-8-sig").strip() if path.is_file() else ""  # Windows' editors put a mark before it
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: must be UTF-8 text: {error}") from None


def _drawings(
    masks: list[Path | None], prompts: list[str], num_images: int, seed: int, output: Path
) -> Iterator[Drawing]:
    """Every image. Into a folder, files are named by mask and seed."""
    folder = output.is_dir() or not output.suffix
    if not folder:
        check_suffix(output)
        if len(masks) > 1:
            raise OutputError(f"{output}: {len(masks)} masks need a folder as output, not a file")
    given = [mask for mask in masks if mask is not None and mask.exists()]
    for i, (mask, prompt) in enumerate(zip(masks, prompts, strict=True)):
        for j in range(num_images):
            number = i * num_images + j
            if folder:
                path = output / f"{mask.stem if mask else 'face'}_{seed + number}.png"
            else:
                path = output if num_images == 1 else output.with_stem(f"{output.stem}_{j + 1}")
            if path.exists() and any(path.samefile(mask) for mask in given):
                raise OutputError(f"{path}: is a mask itself; choose another name for the image")
            yield Drawing(mask, prompt, seed + number, path)


def _check_writable(output: Path) -> None:
    """Before any work is done."""
    folder = output if output.is_dir() or not output.suffix else output.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(f"{output}: can't be written: {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{output}: can't be written: no permission in {folder}")
