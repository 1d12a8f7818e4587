"""Measures hair edits on the demo: is there hair where the new mask has it, and does everything else stay the same?

    python -m benchmarks.edits --report benchmarks/EDITS.json

The masks are the package's examples and their mirror images. Four edits are made of each: hair grows into the background on
all sides, on the left, on the right, and down to the neck and the clothes. The judge is the segmentation network of
`benchmarks.quality_measures`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.quality_measures import Bytes, grow
from mogle_rt import Pipeline
from mogle_rt.bundle.shipped import examples
from mogle_rt.edits.regions import changed_region, default_margin, pixel_weights
from mogle_rt.masks import colorize, to_labels
from mogle_rt.quality.judges.demo import DemoJudge

HAIR, NECK, CLOTH = 13, 17, 18
PIXELS = 9  # how far hair grows
SHOWN = 8  # edits in the picture


class Edit(NamedTuple):
    """A mask, the mask with more hair, and the prompt and seed of both images."""

    before: Bytes
    after: Bytes
    prompt: str
    seed: int


def hair_edits() -> Iterator[Edit]:
    """The edits, in an order in which the first few are of different masks and kinds."""
    cases = [(mirror(to_labels(e.mask), m), e.prompt) for m in (False, True) for e in examples()]
    for kind in range(4):
        for place, (labels, prompt) in enumerate(cases):
            after = with_more_hair(labels, (kind + place) % 4)
            if (after != labels).sum() >= 40:  # a hat or the frame may leave no room
                yield Edit(labels, after, prompt, seed=place)


def mirror(labels: Bytes, mirrored: bool) -> Bytes:
    """The mask, or its mirror image; left and right of eyes, brows and ears change places then."""
    if not mirrored:
        return labels
    swapped = np.arange(19, dtype=np.uint8)
    for left, right in ((4, 5), (6, 7), (8, 9)):
        swapped[[left, right]] = right, left
    return np.ascontiguousarray(swapped[labels][:, ::-1])


def with_more_hair(labels: Bytes, kind: int) -> Bytes:
    """The mask with hair that has grown on all sides (0), left (1), right (2), or down over neck and clothes (3)."""
    hair = labels == HAIR
    where = grow(hair, PIXELS) & (labels == 0)
    columns = np.arange(labels.shape[1])[None, :]
    middle = int(np.nonzero(hair)[1].mean()) if hair.any() else labels.shape[1] // 2
    if kind == 1:
        where &= columns < middle
    elif kind == 2:
        where &= columns >= middle
    elif kind == 3:
        where = hair.copy()
        for _ in range(2 * PIXELS):
            where[1:] |= where[:-1]
        where &= np.isin(labels, (0, NECK, CLOTH)) & ~hair
    edited = labels.copy()
    edited[where] = HAIR
    return edited


def measure(
    bundle: str, count: int, steps: int, strength: float, batch: int
) -> tuple[dict[str, Any], list[Image.Image]]:
    """Draw, edit and judge: the figures, and rows of pictures: both masks and both images."""
    pipe = Pipeline(bundle, device="cpu", dtype="fp32")
    pipe.set_progress_bar_config(disable=True)
    judge, edits = DemoJudge(), list(hair_edits())[:count]
    rows, shares, changed_outside = [], [], 0
    for i in range(0, len(edits), batch):
        some = edits[i : i + batch]
        options: dict[str, Any] = {"num_inference_steps": steps, "seed": [e.seed for e in some]}
        prompts = [e.prompt for e in some]
        images = pipe([e.before for e in some], prompts, **options).images
        assert isinstance(images, list)
        results = pipe.edit(
            images, [e.before for e in some], [e.after for e in some], prompts, strength, **options
        ).images
        for one, image, result in zip(some, images, results, strict=True):
            old, new = np.asarray(image), np.asarray(result)
            region = changed_region(one.before, one.after, [])
            margin = default_margin(*region.shape)
            outside = pixel_weights(region, margin, margin // 2)[0].numpy() == 0
            changed_outside += int((old != new).any(-1)[outside].sum())
            found = judge.labels([new])[0]
            shares.append(float((found[one.after != one.before] == HAIR).mean()))
            row = [colorize(one.before), old, colorize(one.after), new]
            rows.append(Image.fromarray(np.concatenate(row, 1)))
        print(len(shares), "edits", flush=True)
    report = {
        "bundle_sha256": pipe.bundle.content_hash,
        "edits": len(shares),
        "steps": steps,
        "strength": strength,
        "pixels_changed_outside": changed_outside,
        "hair_inside": float(np.mean(shares)),
        "mostly_hair": float(np.mean([share > 0.5 for share in shares])),
        "least": min(shares),
    }
    return report, rows


def sheet(rows: list[Image.Image], columns: int = 2, enlarged: int = 2) -> Image.Image:
    """Rows of pictures below each other, in some columns."""
    width, height = rows[0].width * enlarged, rows[0].height * enlarged
    whole = Image.new("RGB", (columns * (width + 8), -(-len(rows) // columns) * (height + 4)), "white")
    for i, row in enumerate(rows):
        enlarged_row = row.resize((width, height), Image.Resampling.LANCZOS)
        whole.paste(enlarged_row, (i % columns * (width + 8), i // columns * (height + 4)))
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", default="demo")
    parser.add_argument("--report", type=Path, default=Path("benchmarks/EDITS.json"))
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--all", type=Path, help="also write a picture of every edit")
    args = parser.parse_args()
    report, rows = measure(args.bundle, args.count, args.steps, args.strength, args.batch)
    print(json.dumps(report))
    args.report.write_text(json.dumps(report, indent=1) + "\n")
    sheet(rows[:SHOWN], columns=1, enlarged=1).save(args.report.with_suffix(".png"))
    if args.all is not None:
        sheet(rows).save(args.all)


if __name__ == "__main__":
    main()
