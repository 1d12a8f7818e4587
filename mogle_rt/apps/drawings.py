"""Plan which images ``mogle-rt generate`` draws: the mask, prompt, seed and file of each."""

from __future__ import annotations

import json
import os
import string
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from mogle_rt.apps.image_files import SUFFIXES, check_suffix
from mogle_rt.apps.program import console
from mogle_rt.errors import InputError, OutputError

MASK_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".npy"}
FIELDS = ("stem", "seed", "number")  # the fields that a pattern for file names may contain


class Drawing(NamedTuple):
    """An image to draw: its mask, prompt, seed and file."""

    mask: Path | None
    prompt: str
    seed: int
    path: Path


Existing = Literal["refuse", "replace", "skip"]


def plan(
    masks: list[Path | None],
    prompts: list[str] | None,
    num_images: int,
    seed: int,
    output: Path,
    existing: Existing,
    suffix: str | None = None,
    caption: int = 1,
) -> list[Drawing]:
    """List all images to draw, and check the whole list before any work is done.

    Args:
        masks: the masks' paths; None stands for an image without a mask.
        prompts: one for all masks or one for each; None reads the texts that belong to the masks.
        num_images: the number of images for each mask.
        seed: the seed of the first image; each next image has the next seed.
        output: a file, a folder, or a pattern with `FIELDS` in braces.
        existing: what to do if a file exists already; "skip" leaves out images that an interrupted job has drawn.
        suffix: "png" or "jpg" for names without a suffix; None means "png".
        caption: which caption to use, from 1, if a mask has several.

    Raises:
        InputError: prompts are not text, their number is wrong, or a mask has fewer captions.
        OutputError: a file exists already or can't be written.
    """
    drawings = list(_drawings(masks, _prompts(prompts, masks, caption), num_images, seed, output, suffix))
    for path in {drawing.path.parent: drawing.path for drawing in reversed(drawings)}.values():
        _check_writable(path)
    if existing == "replace":
        return drawings
    new = [drawing for drawing in drawings if not drawing.path.exists()]
    if existing == "refuse" and len(new) < len(drawings):
        taken = next(drawing.path for drawing in drawings if drawing.path.exists())
        raise OutputError(f"{taken}: exists already; choose another name, --overwrite or --skip-existing")
    return new


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
    drawings: list[Drawing], batch_size: int, shapes: Mapping[Path | None, tuple[int, ...] | None]
) -> Iterator[list[Drawing]]:
    """Group the drawings in their order, up to ``batch_size`` at once. All masks in a batch have the same shape.

    Otherwise the size of an image would depend on the other images in its batch. ``shapes`` gives each mask's height
    and width, or None for an image without a mask.
    """
    batch: list[Drawing] = []
    for drawing in drawings:
        if batch and (len(batch) == batch_size or shapes[drawing.mask] != shapes[batch[0].mask]):
            yield batch
            batch = []
        batch.append(drawing)
    if batch:
        yield batch


def _looks_like_a_mask(path: Path) -> bool:
    return path.suffix.lower() in MASK_SUFFIXES and not path.name.startswith(".")


def say_how_many_have_prompts(drawings: list[Drawing]) -> None:
    """Print how many masks have a text, if not all have one, because the empty prompt is seldom what the user wants."""
    prompts = {drawing.mask: drawing.prompt for drawing in drawings}
    with_text = sum(bool(prompt) for prompt in prompts.values())
    if with_text < len(prompts):
        console.print(
            f"{with_text:,} of {len(prompts):,} masks have a prompt; the others are drawn from the mask alone. A prompt "
            "is --prompt, a .txt file beside the mask or in ../text, or an entry of ../text.json",
            soft_wrap=True,
            markup=False,
        )


def _prompts(given: list[str] | None, masks: list[Path | None], caption: int) -> list[str]:
    """One prompt for each mask. If masks have several captions, print which one is used."""
    if given is None:
        every = [_captions_of(mask) if mask else [] for mask in masks]
        several = [captions for captions in every if len(captions) > 1]
        if several:
            most = max(map(len, several))
            console.print(
                f"masks have up to {most} captions; number {caption} is the prompt, --caption N chooses another"
            )
        return [_chosen(captions, caption, mask) for captions, mask in zip(every, masks, strict=True)]
    for prompt in given:
        if any("\ud800" <= c <= "\udfff" for c in prompt):  # Python represents bytes that are not text like this
            raise InputError(f"--prompt must be UTF-8 text, got {prompt!r}")
    if len(given) not in (1, len(masks)):
        raise InputError(f"--prompt must be given once or once for each of {len(masks)} masks, got {len(given)}")
    return given * len(masks) if len(given) == 1 else given


def _chosen(captions: list[str], number: int, mask: Path | None) -> str:
    if not captions:
        return ""
    if not 1 <= number <= len(captions):
        has = "1 caption" if len(captions) == 1 else f"{len(captions)} captions"
        raise InputError(f"--caption {number}: {mask} has {has}; give a number from 1 to {len(captions)}")
    return captions[number - 1]


def _captions_of(mask: Path) -> list[str]:
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
        return path.read_text("utf-8-sig").strip() if path.is_file() else ""  # some editors put a byte order mark first
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: must be UTF-8 text: {error}") from None


def _captions(path: Path, stem: str) -> list[str]:
    """The captions of a face in MM-CelebA-HQ's ``text.json``, or none if there is no such file or entry."""
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
        entries = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(entries, dict):
        raise InputError(f"{path}: must hold a JSON object of captions by file name, holds {type(entries).__name__}")
    return entries


def _drawings(
    masks: list[Path | None], prompts: list[str], num_images: int, seed: int, output: Path, suffix: str | None
) -> Iterator[Drawing]:
    """Yield every image to draw. Files in a folder are named by mask and seed."""
    naming = _Naming(output, suffix, masks=len(masks), several_images=num_images > 1)
    given = [mask for mask in masks if mask is not None and mask.exists()]
    named: set[Path] = set()
    for i, (mask, prompt) in enumerate(zip(masks, prompts, strict=True)):
        for j in range(num_images):
            number = i * num_images + j
            path = naming.path(mask, seed + number, number + 1, j + 1)
            if path.exists() and any(path.samefile(mask) for mask in given):
                raise OutputError(f"{path}: is a mask itself; choose another name for the image")
            if path in named:
                raise OutputError(f"{output}: names two images {path}; put {{seed}} or {{number}} into the pattern")
            named.add(path)
            yield Drawing(mask, prompt, seed + number, path)


class _Naming:
    """The names of image files: one file, files in a folder, or files named by a pattern.

    Raises:
        OutputError: a field or format is unknown, or one file is given for several masks.
    """

    def __init__(self, output: Path, suffix: str | None, *, masks: int, several_images: bool) -> None:
        self.output = output
        self.suffix = f".{(suffix or 'png').lower().removeprefix('.')}"
        if self.suffix not in SUFFIXES:
            raise OutputError(f"--format must be png or jpg, got {suffix!r}")
        self.numbered = several_images
        self.pattern = "{" in str(output) and not output.exists()
        self.folder = not self.pattern and (output.is_dir() or not output.suffix)
        if self.pattern:
            self._check_pattern()
        elif not self.folder:
            check_suffix(output)
            if masks > 1:
                raise OutputError(f"{output}: {masks} masks need a folder as output, not a file")
        if (
            not self.folder
            and suffix is not None
            and output.suffix
            and SUFFIXES.get(self.suffix) != check_suffix(output)
        ):
            raise OutputError(
                f"{output}: --format {suffix} contradicts the name's {output.suffix}; leave one of them out"
            )

    def path(self, mask: Path | None, seed: int, number: int, number_of_mask: int) -> Path:
        """The file of one image. ``number`` counts all images from 1, ``number_of_mask`` those of the same mask."""
        stem = mask.stem if mask else "face"
        if self.folder:
            return self.output / f"{stem}_{seed}{self.suffix}"
        if self.pattern:
            named = Path(str(self.output).format(stem=stem, seed=seed, number=number))
            return named if self.output.suffix else named.with_name(named.name + self.suffix)
        return self.output.with_stem(f"{self.output.stem}_{number_of_mask}") if self.numbered else self.output

    def _check_pattern(self) -> None:
        if self.output.suffix:
            check_suffix(self.output)
        try:
            for _, name, form, conversion in string.Formatter().parse(str(self.output)):
                if name is not None and (name not in FIELDS or form or conversion):
                    raise ValueError(f"unknown {{{name}}}")
        except ValueError as error:
            known = ", ".join(f"{{{name}}}" for name in FIELDS)
            raise OutputError(f"{self.output}: a pattern may hold {known}; {error}") from None


def _check_writable(path: Path) -> None:
    """Check that a file's folder exists or can be created, and is writable. This is done before any other work."""
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(f"{path}: can't be written: {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{path}: can't be written: no permission in {folder}")
