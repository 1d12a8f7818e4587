"""The names of image files: one file, files in a folder, or files named by a pattern."""

from __future__ import annotations

import os
import string
from pathlib import Path

from mogle_rt.errors import OutputError
from mogle_rt.jobs.image_files import SUFFIXES, check_suffix

FIELDS = ("stem", "seed", "number")  # the fields that a pattern for file names may contain


class Naming:
    """The names of a job's images.

    Args:
        output: a file, a folder, or a pattern with `FIELDS` in braces.
        suffix: "png" or "jpg" for names without a suffix; None means "png".
        masks: the number of masks.
        several_images: whether each mask has several images.

    Attributes:
        folder: the folder that holds all images, or the folders that they are in.
        hold_seed: whether the name of an image contains its seed.

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
        self.is_folder = not self.pattern and (output.is_dir() or not output.suffix)
        if self.pattern:
            self._check_pattern()
        elif not self.is_folder:
            check_suffix(output)
            if masks > 1:
                raise OutputError(f"{output}: {masks} masks need a folder as output, not a file")
        if (
            not self.is_folder
            and suffix is not None
            and output.suffix
            and SUFFIXES.get(self.suffix) != check_suffix(output)
        ):
            raise OutputError(
                f"{output}: --format {suffix} contradicts the name's {output.suffix}; leave one of them out"
            )
        self.folder = self._folder()
        self.hold_seed = self.is_folder or (self.pattern and "{seed}" in str(output))

    def path(self, stem: str, seed: int, number: int, number_of_mask: int) -> Path:
        """The file of one image.

        Args:
            stem: the name of the mask without its suffix, or whatever else tells the images apart.
            number: counts all images from 1. number_of_mask: counts those of the same mask.
        """
        if self.is_folder:
            return self.output / f"{stem}_{seed}{self.suffix}"
        if self.pattern:
            named = Path(str(self.output).format(stem=stem, seed=seed, number=number))
            return named if self.output.suffix else named.with_name(named.name + self.suffix)
        return self.output.with_stem(f"{self.output.stem}_{number_of_mask}") if self.numbered else self.output

    def _folder(self) -> Path:
        if self.is_folder:
            return self.output
        folder = self.output.parent
        while "{" in str(folder):
            folder = folder.parent
        return folder

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


def check_writable(path: Path) -> None:
    """Check that a file's folder exists or can be created, and is writable. This is done before any other work.

    Raises:
        OutputError: it can't be written.
    """
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(f"{path}: can't be written: {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{path}: can't be written: no permission in {folder}")
