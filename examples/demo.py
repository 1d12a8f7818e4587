"""Draws the package's examples with the package's own checkpoint into one picture. `make demo` runs it.

    python examples/demo.py demo/grid.png

Each example shows its mask, the image below it, and the prompt. The last two examples show an edit: seed and prompt are
the same, and the masks differ in the hair alone.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_dilation

from mogle_rt import Pipeline
from mogle_rt.bundle.shipped import Example, examples
from mogle_rt.masks import colorize, to_labels

SEED = 3
TILE, GAP, TEXT = 192, 8, 140  # pixels: side of a picture, gap between pictures, room for a prompt
FONT, LETTERS = 15, 24  # the prompts' font size in pixels, and the most letters in a line
COLUMNS = 5  # examples in a row; prompts stay readable on pages that are narrower than the picture
HAIR, BACKGROUND = 13, 0
EDITED = "short"  # the example whose hair is changed
Labels = NDArray[np.uint8]


def longer_hair(labels: Labels, pixels: int = 26) -> Labels:
    """The mask with longer hair: its lower half grows down and outwards over background, neck and clothes."""
    hair = labels == HAIR
    rows = np.nonzero(hair)[0]
    middle = int(np.median(rows))
    lower = hair.copy()
    lower[:middle] = False
    grown = binary_dilation(lower, iterations=3)
    for _ in range(pixels):
        grown[1:] |= grown[:-1]
    edited = labels.copy()
    edited[grown & np.isin(labels, (BACKGROUND, 17, 18))] = HAIR
    return edited


def draw(pipe: Pipeline, labels: Labels, prompt: str) -> Image.Image:
    """Draw one image, always from the same seed."""
    image = pipe(labels, prompt, generator=torch.Generator().manual_seed(SEED)).images[0]
    assert isinstance(image, Image.Image)
    return image


def column(labels: Labels, image: Image.Image, text: str) -> Image.Image:
    """One example: its mask, the image below it, and the text below that."""
    tile = Image.new("RGB", (TILE, 2 * TILE + GAP + TEXT), "white")
    tile.paste(Image.fromarray(colorize(labels)).resize((TILE, TILE), Image.Resampling.NEAREST), (0, 0))
    tile.paste(image.resize((TILE, TILE), Image.Resampling.BICUBIC), (0, TILE + GAP))
    lines = "\n".join(textwrap.wrap(text, LETTERS))
    ImageDraw.Draw(tile).multiline_text((0, 2 * TILE + GAP), lines, fill="black", font=ImageFont.load_default(FONT))
    return tile


def grid(pipe: Pipeline, shown: list[Example]) -> Image.Image:
    """All examples, with `COLUMNS` of them in a row."""
    columns = []
    for example in shown:
        labels = to_labels(example.mask)
        columns.append(column(labels, draw(pipe, labels, example.prompt), example.prompt))
        if example.name == EDITED:
            edited = longer_hair(labels)
            text = "the same prompt and seed, another hair region"
            columns.append(column(edited, draw(pipe, edited, example.prompt), text))
    width, height = min(len(columns), COLUMNS) * (TILE + GAP) - GAP, columns[0].height
    picture = Image.new("RGB", (width, -(-len(columns) // COLUMNS) * height), "white")
    for i, one in enumerate(columns):
        picture.paste(one, (i % COLUMNS * (TILE + GAP), i // COLUMNS * height))
    return picture


def main() -> None:
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "demo/grid.png")
    output.parent.mkdir(parents=True, exist_ok=True)
    pipe = Pipeline("demo", device="cpu")
    shown = sorted(examples(), key=lambda e: e.name == EDITED)  # the edited one last, beside its edit
    grid(pipe, shown).save(output)
    print(output)


if __name__ == "__main__":
    main()
