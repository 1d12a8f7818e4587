"""The folder of a calibration: what was drawn and measured so far, so that one that was stopped goes on.

Its file of JSON lines begins with the settings that all images share. Each further line is about one image, and is
written when the image is there.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mogle_rt.bundle.files import atomic_write
from mogle_rt.errors import InputError, OutputError
from mogle_rt.fast.settings import FastConfig
from mogle_rt.jobs.image_files import save_image
from mogle_rt.quality.calibration.cases import Case
from mogle_rt.quality.calibration.ways import EXACT, file_stem
from mogle_rt.quality.pictures import Picture, read_picture
from mogle_rt.values import Range, parsed, quoted, read_json

NAME = "calibration.jsonl"
KIND = "mogle-rt calibration 1"
Latents = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What was measured of one image, see `mogle_rt.quality.calibration.choosing.Figures`.

    Attributes:
        case: its key. way: what was left out, as a text; "" of the exact image.
        seconds: that it took, without encoding. beside: those that the exact image took at about the same time.
        computed: steps. condition: those of them that computed the condition too.
        psnr, ssim, latents: beside the exact image. mask: its mask consistency.
    """

    case: str
    way: str
    seconds: Annotated[float, Range(0, 1e9)]
    beside: Annotated[float, Range(1e-9, 1e9)]
    computed: Annotated[int, Range(0, 10_000)]
    condition: Annotated[int, Range(0, 10_000)]
    psnr: Annotated[float, Range(-100, 121)]
    ssim: Annotated[float, Range(-1.01, 1.01)] | None
    latents: Annotated[float, Range(0, 1e9)]
    mask: Annotated[float, Range(0, 1)] | None


class Results:
    """The folder's contents.

    Args:
        folder: it may not be there yet, and is not written to before the first image.
        settings: that all images share, as JSON has them. A folder of other settings is refused.

    Raises:
        OutputError: what is there is no calibration, or one of other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.path = folder, folder / NAME
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        self._drawn: dict[tuple[str, str], Drawn] = {}
        try:
            content = self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise OutputError(f"{self.path}: can't be read: {error.strerror or error}") from None
        self._read(content)

    def has(self, case: Case, way: FastConfig) -> bool:
        """Whether an image is there, and was measured."""
        there = (case.key, str(way)) in self._drawn and self.image_path(case, way).is_file()
        return there and (not way.exact or self._latents_path(case).is_file())

    def of(self, case: Case, way: FastConfig) -> Drawn:
        """What was measured of an image that is there."""
        return self._drawn[case.key, str(way)]

    def image_path(self, case: Case, way: FastConfig) -> Path:
        """Where an image lies."""
        return self.folder / "images" / case.name / f"{file_stem(way)}.png"

    def exact(self, case: Case) -> tuple[Latents, Picture]:
        """The latents and the picture of an exact image that is there.

        Raises:
            InputError: a file is damaged.
        """
        path = self._latents_path(case)
        try:
            latents = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise InputError(f"{path}: is damaged; remove it, and it is drawn again") from None
        return latents, read_picture(self.image_path(case, EXACT))

    def keep_latents(self, case: Case, latents: Latents) -> None:
        """Write the latents of an exact image."""
        with atomic_write(self._latents_path(case)) as file:
            np.save(file, latents, allow_pickle=False)

    def add(self, case: Case, way: FastConfig, image: Image.Image, drawn: Drawn) -> None:
        """Write an image, and what was measured of it.

        Raises:
            OutputError: it can't be written.
        """
        save_image(image, self.image_path(case, way))
        lines = [dataclasses.asdict(drawn)]
        if not self.path.exists():
            lines.insert(0, {"kind": KIND, "settings": self.settings})
        try:
            with self.path.open("ab+") as file:
                end = file.seek(0, os.SEEK_END)
                torn = end and os.pread(file.fileno(), 1, end - 1) != b"\n"  # a process could not finish its line
                file.write(b"\n" * bool(torn) + b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        except OSError as error:
            raise OutputError(f"{self.path}: can't be written: {error.strerror or error}") from None
        self._drawn[drawn.case, drawn.way] = drawn

    def _latents_path(self, case: Case) -> Path:
        return self.folder / "exact" / f"{case.name}.npy"

    def _read(self, content: bytes) -> None:
        known = None
        for number, text in enumerate(content.splitlines(), 1):
            try:
                line = read_json(text)
            except ValueError:  # a process could not finish it
                continue
            try:
                if known is None:
                    if line["kind"] != KIND:
                        raise ValueError("of another kind")
                    known = parsed(Mapping[str, Any], line["settings"], "settings")
                else:
                    drawn = parsed(Drawn, line, "line")
                    self._drawn[drawn.case, drawn.way] = drawn
            except (ValueError, KeyError, TypeError):
                raise OutputError(
                    f"{self.path}: line {number} is not of a calibration; remove the file, or choose another folder with -o"
                ) from None
        for name in {**(known or {}), **self.settings} if known is not None else ():
            there, asked = (known or {}).get(name), self.settings.get(name)
            if there != asked:
                raise OutputError(
                    f"{self.folder}: was calibrated with {name} {quoted(there)}, asked for is {quoted(asked)}; give the "
                    "same settings to go on, or another folder with -o"
                )
