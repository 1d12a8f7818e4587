"""Images that an edit starts from: every form gives the same pixels, and everything else is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mogle_rt.edits.images import to_pixels
from mogle_rt.errors import InputError

pytestmark = pytest.mark.quick

BYTES = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
PICTURE = Image.fromarray(BYTES)


def test_every_form_gives_the_same_pixels(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "image.png")
    opaque = PICTURE.convert("RGBA")
    floats = BYTES.astype(np.float32) / 255
    channels_first = torch.from_numpy(floats).permute(2, 0, 1)
    expected = channels_first[None]
    forms: list[Any] = [
        tmp_path / "image.png", str(tmp_path / "image.png"), (tmp_path / "image.png").read_bytes(),
        PICTURE, opaque, BYTES, floats, floats[None],
        channels_first, channels_first[None], torch.from_numpy(BYTES).permute(2, 0, 1), [PICTURE],
    ]  # fmt: skip
    for form in forms:
        assert torch.equal(to_pixels(form), expected)
    assert torch.equal(to_pixels([PICTURE, BYTES]), expected.expand(2, -1, -1, -1))
    assert to_pixels(PICTURE.convert("L")).shape == expected.shape


def test_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    PICTURE.save(tmp_path / "turned.png", exif=exif)
    assert to_pixels(tmp_path / "turned.png").shape == (1, 3, 32, 16)


def with_file(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


BAD: list[tuple[Any, str]] = [
    ([], "the list of images is empty"),
    (None, "image must be a path, a PIL image, an array"),
    (np.zeros((16, 16), np.uint8), r"got shape \[16, 16\]"),
    (np.zeros((16, 16, 3), np.int64), "must hold uint8 or floating point values, got torch.int64"),
    (np.full((16, 16, 3), 255.0), "must hold values from 0 to 1"),
    (np.full((16, 16, 3), np.nan), "must hold values from 0 to 1"),
    (Image.new("RGB", (100, 60)), r"100 x 60 pixels, .* multiples of 16: crop or resize it, for example to 96 x 64"),
    (Image.new("RGBA", (16, 16)), "has transparent pixels"),
    (Image.new("I;16", (16, 16)), "8 bits a channel, got one of mode I;16"),
    ([PICTURE, Image.new("RGB", (16, 16))], "must have the same size, got 32 x 16 and 16 x 16"),
    (np.zeros((0, 16, 3), np.uint8), "an image can have 1 to"),
    (Image.new("L", (16384, 2048)), "an image can have 1 to 16,777,216 pixels, got 16384 x 2048"),
    ("nowhere.png", "nowhere.png: no such file"),
    (b"content", "image: not an image that can be read"),
]


@pytest.mark.parametrize(("image", "message"), BAD, ids=lambda v: v[:30] if isinstance(v, str) else "")
def test_what_is_no_image_is_refused(image: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_pixels(image)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "image.png")
    whole = (tmp_path / "image.png").read_bytes()
    for path, message in (
        (tmp_path, "is a folder, not an image"),
        (with_file(tmp_path, "text.png", b"hello"), "text.png: not an image that can be read"),
        (with_file(tmp_path, "cut.png", whole[: len(whole) // 2]), "cut.png: can't be read"),
    ):
        with pytest.raises(InputError, match=message):
            to_pixels(path)
