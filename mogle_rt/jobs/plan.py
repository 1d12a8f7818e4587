"""Plan which images a job draws: the mask, prompt, seed and file of each."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mogle_rt.errors import InputError, OutputError
from mogle_rt.jobs.naming import Naming, check_writable

MASK_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".npy"}


class Drawing(NamedTuple):
    """An image to draw: its mask, prompt, seed and file, and the options that are its own rather than the job's."""

    mask: Path | None
    prompt: str
    seed: int
    path: Path
    options: tuple[tuple[str, Any], ...] = ()


Existing = Literal["refuse", "replace", "skip"]


def plan(
    masks: Sequence[Path | None],
    prompts: Sequence[str],
    num_images: int,
    seed: int,
    naming: Naming,
    places: Sequence[int] | None = None,
) -> list[Drawing]:
    """List all images of a job, and check the whole list before any work is done.

    Args:
        masks: the masks' paths; None stands for an image without a mask.
        prompts: one for each mask.
        num_images: the number of images for each mask.
        seed: the first seed of the job. Image j of the mask at place i has the seed ``seed + i * num_images + j``.
        naming: gives the files' names.
        places: the place of each mask in the job; None means that they stand in its order.

    Raises:
        OutputError: a file can't be written, two images have the same name, or an image has the name of a mask.
    """
    given = [mask for mask in masks if mask is not None and mask.exists()]
    drawings: dict[Path, Drawing] = {}
    for place, mask, prompt in zip(range(len(masks)) if places is None else places, masks, prompts, strict=True):
        for j in range(num_images):
            number = place * num_images + j
            path = naming.path(mask.stem if mask else "face", seed + number, number + 1, j + 1)
            if path.exists() and any(path.samefile(mask) for mask in given):
                raise OutputError(f"{path}: is a mask itself; choose another name for the image")
            if path in drawings:
                raise OutputError(
                    f"{naming.output}: names two images {path}; put {{seed}} or {{number}} into the pattern"
                )
            drawings[path] = Drawing(mask, prompt, seed + number, path)
    for path in {path.parent: path for path in reversed(drawings)}.values():
        check_writable(path)
    return list(drawings.values())


def to_draw(drawings: Sequence[Drawing], existing: Existing) -> list[Drawing]:
    """The images of a job that have still to be drawn.

    Args:
        drawings: all images.
        existing: what to do if a file exists already; "skip" leaves out images that an interrupted job has drawn.

    Raises:
        OutputError: a file exists already, and ``existing`` is "refuse".
    """
    if existing == "replace":
        return list(drawings)
    new = [drawing for drawing in drawings if not drawing.path.exists()]
    if existing == "refuse" and len(new) < len(drawings):
        taken = next(drawing.path for drawing in drawings if drawing.path.exists())
        raise OutputError(f"{taken}: exists already; choose another name, --overwrite or --skip-existing")
    return new


def shard(drawings: Sequence[Drawing], part: str | None) -> list[Drawing]:
    """One of several equal parts of a job, each of which another process or machine can draw.

    Args:
        drawings: all images of the job.
        part: "I/N" means part I of N, from 1; None means all images.

    Raises:
        InputError: ``part`` has another form.
    """
    if part is None:
        return list(drawings)
    number, slash, count = part.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise InputError(f"--shard must be I/N, part I of N, as 1/2, got {part!r}")
    return list(drawings)[int(number) - 1 :: int(count)]


def find_masks(paths: list[Path]) -> Iterator[Path]:
    """Yield the masks that are meant by files, folders and patterns such as ``masks/*.png``, each sorted by name.

    A folder of part files, as in CelebAMask-HQ, is one mask.

    Raises:
        InputError: a folder holds no masks, or no mask matches a pattern.
    """
    from mogle_rt.masks.planes import part_files

    for path in (Path(os.path.expanduser(path)) for path in paths):
        if path.is_dir() and not part_files(path):
            found = sorted(p for p in path.iterdir() if _looks_like_a_mask(p))
            if not found:
                raise InputError(f"{path}: a folder without masks ({', '.join(sorted(MASK_SUFFIXES))})")
        elif any(c in str(path) for c in "*?[") and not path.exists():
            root = Path(path.anchor)
            found = sorted(p for p in root.glob(str(path.relative_to(root))) if _looks_like_a_mask(p))
            if not found:
                raise InputError(f"{path}: no mask fits this pattern ({', '.join(sorted(MASK_SUFFIXES))})")
        else:
            found = [path]
        yield from found


def batches(
    drawings: Sequence[Drawing], batch_size: int, alike: Callable[[Drawing], Hashable]
) -> Iterator[list[Drawing]]:
    """Group the drawings in their order, up to ``batch_size`` at once.

    Args:
        alike: gives what must be equal for all drawings of a batch: at least the shape of the mask, as otherwise the size
            of an image would depend on the other images in its batch.
    """
    batch: list[Drawing] = []
    for drawing in drawings:
        if batch and (len(batch) == batch_size or alike(drawing) != alike(batch[0])):
            yield batch
            batch = []
        batch.append(drawing)
    if batch:
        yield batch


def count_prompts(drawings: Sequence[Drawing]) -> str | None:
    """Say how many masks have a text, if not all have one, because the empty prompt is seldom what the user wants."""
    prompts = {drawing.mask: drawing.prompt for drawing in drawings}
    with_text = sum(bool(prompt) for prompt in prompts.values())
    if with_text == len(prompts):
        return None
    return (
        f"{with_text:,} of {len(prompts):,} masks have a prompt; the others are drawn from the mask alone. A prompt "
        "is --prompt, a .txt file beside the mask or in ../text, or an entry of ../text.json"
    )


def mask_names(masks: Sequence[Path | None]) -> list[str]:
    """Names of masks for a record: those of their files, numbered where there are several of one name."""
    seen: dict[str, int] = {}
    names = []
    for mask in masks:
        name = "" if mask is None else mask.name
        seen[name] = seen.get(name, 0) + 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names


def digest_of(mask: Path | None) -> str:
    """A short digest of a mask's file, or of the files of its folder; "" of no mask."""
    if mask is None:
        return ""
    if mask.is_dir():
        files = sorted(path for path in mask.iterdir() if path.is_file())
        return short_digest(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files))
    return short_digest(mask.read_bytes())


def short_digest(content: bytes) -> str:
    """The first 16 digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def _looks_like_a_mask(path: Path) -> bool:
    return path.suffix.lower() in MASK_SUFFIXES and not path.name.startswith(".")
