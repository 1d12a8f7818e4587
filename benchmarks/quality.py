"""Measures how good the faces of a bundle are on held-out renders, and compares them with ablations of the model.

    python -m benchmarks.quality --renders build/demo/held_out --bundle demo --report benchmarks/QUALITY.json

The renders are made by `examples.demo_checkpoint.render`. `benchmarks.quality_measures` has the measures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.ablations import ablated
from benchmarks.quality_measures import (
    Bytes,
    Cases,
    Judge,
    diversity,
    draw,
    grow,
    load_cases,
    more_hair,
    reconstruct,
)
from mogle_rt import Pipeline
from mogle_rt.masks import colorize
from mogle_rt.quality.drift import psnr_outside

SHOWN = 12  # how many cases the picture shows


def picture(rows: list[Bytes]) -> Image.Image:
    """Join rows of pictures, one row below the other."""
    return Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in rows]))


def measure(bundle: str, cases: Cases, sizes: argparse.Namespace) -> tuple[dict[str, Any], list[Bytes]]:
    """Measure all runs, and print each result as soon as it is known.

    Returns:
        The measures by the name of the run, and rows of example pictures.
    """
    pipe = Pipeline(bundle, device="cpu", dtype="fp32")
    pipe.set_progress_bar_config(disable=True)
    judge = Judge(cases.images)
    main, some, few = cases.first(sizes.count), cases.first(sizes.some), cases.first(sizes.few)
    report: dict[str, Any] = {"bundle_sha256": pipe.bundle.content_hash}
    rows = [main.images[:SHOWN], colorize(main.labels[:SHOWN])]

    def put(name: str, value: dict[str, Any]) -> None:
        report[name] = value
        print(name, json.dumps({k: v for k, v in value.items() if k != "iou"}), flush=True)

    put("renders", judge(main.images, main))
    put("reconstructions", judge(reconstruct(pipe, main.images), main))
    for steps in (28, 14, 8):
        chosen = main if steps == 28 else some
        images, seconds = draw(pipe, chosen, steps)
        put(f"mask and prompt, {steps} steps", judge(images, chosen) | {"seconds": seconds})
        rows.append(images[:SHOWN])
        for name, mask, prompt in (("mask only", True, False), ("prompt only", False, True)):
            chosen = some if steps == 28 else few
            images, seconds = draw(pipe, chosen, steps, mask=mask, prompt=prompt)
            put(f"{name}, {steps} steps", judge(images, chosen, masked=mask, prompted=prompt) | {"seconds": seconds})
            if steps == 28:
                rows.append(images[:SHOWN])
    base = draw(pipe, few, 28)[0]
    edits = np.stack([more_hair(one) for one in few.labels])
    edited = draw(pipe, few, 28, labels=edits)[0]
    outside = [psnr_outside(a, b, grow(x != y, 3)) for a, b, x, y in zip(base, edited, edits, few.labels, strict=True)]
    inside = [
        float((judge.labels(b[None])[0][x != y] == 13).mean())
        for b, x, y in zip(edited, edits, few.labels, strict=True)
        if (x != y).any()
    ]
    put("edit", {"psnr_outside": float(np.mean(outside)), "hair_inside": float(np.mean(inside))})
    dozen = few.first(10)
    spread = {"mask and prompt": {}, "mask only": {"prompt": False}, "prompt only": {"mask": False}}
    put("diversity", {name: diversity(pipe, dozen, 14, **options) for name, options in spread.items()})
    put("ablation: none", judge(base, few))
    for name, other in ablated(bundle).items():
        images, _ = draw(other, few, 28)
        put(f"ablation: {name}", judge(images, few))
    return report, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--renders", type=Path, default=Path("build/demo/held_out"))
    parser.add_argument("--bundle", default="demo")
    parser.add_argument("--report", type=Path, default=Path("benchmarks/QUALITY.json"))
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--count", type=int, default=200, help="number of cases for the main figures")
    parser.add_argument(
        "--some", type=int, default=100, help="number of cases for other step counts, and for mask or prompt only"
    )
    parser.add_argument("--few", type=int, default=50, help="number of cases for edits and ablations")
    args = parser.parse_args()
    report, rows = measure(args.bundle, load_cases(args.renders, tuple(args.size), args.count), args)
    args.report.write_text(json.dumps(report, indent=1) + "\n")
    picture(rows).save(args.report.with_suffix(".png"))


if __name__ == "__main__":
    main()
