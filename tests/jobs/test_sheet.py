"""The contact sheet: what is on it, and that its tiles show the images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mogle_rt import masks
from mogle_rt.jobs.plan import Drawing
from mogle_rt.jobs.sheet import CAPTION, GAP, LARGEST_SHEET, LARGEST_TILE, write_grid, write_sheet


def test_masks_and_their_images_side_by_side(tmp_path: Path) -> None:
    labels = np.full((32, 64), 13, dtype=np.uint8)  # hair
    masks.to_image(labels).save(tmp_path / "m.png")
    for name, colour in (("a", "red"), ("b", "lime")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{name}.png")
    drawings = [Drawing(tmp_path / "m.png", "", i, tmp_path / f"{name}.png") for i, name in enumerate("abz")]
    assert write_sheet(tmp_path / "sheet.png", drawings, "celebamask") == 2  # z isn't there
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * (LARGEST_TILE + GAP) + GAP, LARGEST_TILE + CAPTION + 2 * GAP)
        middles = [sheet.getpixel((GAP + i * (LARGEST_TILE + GAP) + 128, GAP + 128)) for i in range(3)]
        assert middles == [tuple(masks.PALETTE[13]), (255, 0, 0), (0, 255, 0)]
        assert sheet.getpixel((GAP + 128, GAP + 32)) == (255, 255, 255)  # the mask keeps its shape
        assert np.asarray(sheet.convert("L"))[-CAPTION:].min() < 100  # names


@pytest.mark.parametrize("count", [0, 1, 2, 7, 50])
def test_every_image_has_its_place(count: int, tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    Image.new("RGB", (16, 16), "red").save(path)
    drawings = [Drawing(None, "", i, path) for i in range(count)]
    assert write_sheet(tmp_path / "sheet.jpg", drawings, "celebamask") == count
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.width <= LARGEST_SHEET
        red = np.asarray(sheet)[:, :, 0].astype(int) - np.asarray(sheet)[:, :, 1] > 200
        assert red.sum() == pytest.approx(count * LARGEST_TILE**2, rel=0.02)


def test_rows_of_pictures(tmp_path: Path) -> None:
    red, lime = (Image.new("RGB", (64, 32), colour) for colour in ("red", "lime"))
    write_grid(tmp_path / "grid.png", [[(red, "a"), (lime, "b")], [(lime, "c")]])
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.size == (2 * (64 + GAP) + GAP, 2 * (32 + CAPTION + GAP) + GAP)
        at = [(GAP + 32, GAP + 16), (2 * GAP + 96, GAP + 16), (GAP + 32, 2 * GAP + CAPTION + 48)]
        assert [sheet.getpixel(place) for place in at] == [(255, 0, 0), (0, 255, 0), (0, 255, 0)]
        below = np.asarray(sheet.convert("L"))[GAP + 32 : GAP + 32 + CAPTION]
        assert below[:, GAP : GAP + 64].min() < 100  # a name below each
        assert below[:, 2 * GAP + 64 :].min() < 100


def test_a_sheet_of_large_pictures_is_shrunk(tmp_path: Path) -> None:
    large = Image.new("RGB", (1024, 1024), "red")
    write_grid(tmp_path / "grid.jpg", [[(large, "")] * 16] * 2)
    with Image.open(tmp_path / "grid.jpg") as sheet:
        assert LARGEST_SHEET * 0.9 < sheet.width <= LARGEST_SHEET
