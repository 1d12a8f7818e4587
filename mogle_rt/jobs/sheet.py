"""A contact sheet: the masks and images of a job in one picture, to be looked over at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mogle_rt.jobs.image_files import save_image
from mogle_rt.jobs.plan import Drawing

LARGEST_TILE, SMALLEST_TILE = 256, 48  # pixels: the side of the square that a picture is fitted into
LARGEST_SHEET = 8192  # pixels: tiles shrink so that a sheet of many images is not wider
GAP, CAPTION = 6, 14  # pixels: between the tiles, and of the line below each


def write_sheet(path: Path, drawings: Sequence[Drawing], order: str | Sequence[str]) -> int:
    """Write the sheet of those images that are there: each mask, then its images, with their names below.

    Args:
        path: .png or .jpg; replaced if it is there.
        drawings: the job's images, in their order.
        order: of the masks' labels, see `mogle_rt.masks.to_labels`.

    Returns:
        How many images are on it.

    Raises:
        OutputError: the file can't be written.
    """
    rows: dict[Path | None, list[Path]] = {}
    for drawing in drawings:
        if drawing.path.exists():
            rows.setdefault(drawing.mask, []).append(drawing.path)
    count = sum(len(images) + (mask is not None) for mask, images in rows.items())
    group = max((len(images) + (mask is not None) for mask, images in rows.items()), default=1)
    # A mask and its images stay side by side, in a sheet that is about as wide as it is high.
    root = math.sqrt(count)
    columns = max(1, round(root / group)) * group if group <= 2 * root else max(1, math.ceil(root))
    side = max(SMALLEST_TILE, min(LARGEST_TILE, LARGEST_SHEET // columns - GAP))
    sheet = Image.new(
        "RGB", (columns * (side + GAP) + GAP, -(-count // columns) * (side + CAPTION + GAP) + GAP), "white"
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(CAPTION - 3)
    place = 0
    for mask, images in rows.items():
        for shown in ([] if mask is None else [mask]) + images:
            x = GAP + place % columns * (side + GAP)
            y = GAP + place // columns * (side + CAPTION + GAP)
            tile = _picture_of_mask(shown, order) if shown is mask else _picture(shown)
            scale = side / max(tile.size)
            smooth = Image.Resampling.NEAREST if shown is mask else Image.Resampling.LANCZOS
            tile = tile.resize([max(1, round(pixels * scale)) for pixels in tile.size], smooth)
            sheet.paste(tile, (x + (side - tile.width) // 2, y + (side - tile.height) // 2))
            pen.text((x, y + side), _fitting(shown.name, pen, font, side), fill="black", font=font)
            place += 1
    save_image(sheet, path)
    return sum(map(len, rows.values()))


def _picture_of_mask(mask: Path, order: str | Sequence[str]) -> Image.Image:
    from mogle_rt.masks.labels import colorize, to_labels

    return Image.fromarray(colorize(to_labels(mask, order=order)))


def _picture(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _fitting(
    text: str, pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int
) -> str:
    """A name that fits a width; its end, which tells images apart, stays."""
    shown = text.encode(errors="replace").decode()
    if pen.textlength(shown, font=font) <= width:
        return shown
    while len(shown) > 1 and pen.textlength(f"…{shown}", font=font) > width:
        shown = shown[1:]
    return f"…{shown}"


def write_grid(path: Path, rows: Sequence[Sequence[tuple[Image.Image, str]]]) -> None:
    """Write rows of pictures of about one size, each with a line of text below it.

    Pictures keep their sizes, unless the sheet would be too large.

    Args:
        path: .png or .jpg; replaced if it is there.

    Raises:
        OutputError: the file can't be written.
    """
    cells = [cell for row in rows for cell in row]
    width, height = (max((picture.size[i] for picture, _ in cells), default=1) for i in (0, 1))
    columns = max(map(len, rows), default=1)
    room = (LARGEST_SHEET - GAP) // columns - GAP, (LARGEST_SHEET - GAP) // max(1, len(rows)) - CAPTION - GAP
    scale = min(1.0, room[0] / width, room[1] / height)
    width, height = max(SMALLEST_TILE, int(width * scale)), max(1, int(height * scale))
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, len(rows) * (height + CAPTION + GAP) + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(CAPTION - 3)
    for i, row in enumerate(rows):
        y = GAP + i * (height + CAPTION + GAP)
        for j, (picture, text) in enumerate(row):
            x = GAP + j * (width + GAP)
            if scale < 1:
                size = [max(1, int(pixels * scale)) for pixels in picture.size]
                picture = picture.resize(size, Image.Resampling.LANCZOS)
            sheet.paste(picture, (x, y))
            pen.text((x, y + height), _fitting(text, pen, font, width), fill="black", font=font)
    save_image(sheet, path)
