"""Measures what weights in eight and four bits change: the demo's images beside exact ones, and outliers at FLUX's width.

    python -m benchmarks.precision --report benchmarks/PRECISION.json --page benchmarks/QUALITY.md

The package's eight masks and prompts are drawn with several seeds each. *Unpacked* is what a CPU computes: weights are
rounded, activations are not. *Kernels* is what a GPU computes: activations are rounded, too, which is emulated here with
the kernels' own rounding. The page gets the tables between the two marks.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality_measures import Bytes
from mogle_rt import Pipeline
from mogle_rt.bundle.shipped import examples
from mogle_rt.bundle.storage import STORAGES, Fp8Storage, Int4Storage, Int8Storage, WeightStorage
from mogle_rt.conversion.writing.quantize import quantize
from mogle_rt.kernels.quantize_rows import quantize_rows_ref
from mogle_rt.linear.contract import Multiply, RowForm
from mogle_rt.linear.quantised.base import QuantisedWeight
from mogle_rt.linear.quantised.rotation import rotate
from mogle_rt.linear.quantised.rounding import dequantised, quantised, signal_to_noise
from mogle_rt.masks import to_labels
from mogle_rt.quality.drift import colour_shift, latents_error, psnr
from mogle_rt.quality.judges.demo import DemoJudge
from mogle_rt.quality.regions import iou

BEGIN, END = "<!-- precision: begin -->", "<!-- precision: end -->"
WIDTH, ROWS = 3072, 512
FEW_COLUMNS = (17, 420, 1033, 2048, 2900)  # of the activations, which are larger than all others
TIMES_LARGER = 40


def rounded_rows(x: Tensor, form: RowForm) -> Tensor:
    """Rows as the kernels quantise them, turned back into numbers in the same columns."""
    values, scales = torch.empty(x.shape, dtype=form.dtype), torch.empty(len(x))
    quantize_rows_ref(x, None, values, scales, form.rotation)
    return rotate(values.float() * scales[:, None], form.rotation)


@contextmanager
def activations_rounded() -> Iterator[None]:
    """Every product of the formats that want quantised rows gets them, as on a GPU."""
    exact = QuantisedWeight.product

    def product(self: QuantisedWeight, *args: Any, **kwargs: Any) -> tuple[Multiply, bool]:
        multiply, gelu = exact(self, *args, **kwargs)
        form = self.wants
        if form is None:
            return multiply, gelu
        return lambda x: multiply(rounded_rows(x, form)), gelu

    QuantisedWeight.product = product  # type: ignore[method-assign]
    try:
        yield
    finally:
        QuantisedWeight.product = exact  # type: ignore[method-assign]


def draw(pipe: Pipeline, seeds: int, steps: int) -> tuple[Tensor, Bytes]:
    """Latents [n, N, 64] and images uint8 [n, H, W, 3] of every example with every seed."""
    pipe.set_progress_bar_config(disable=True)
    latents, images = [], []
    size = pipe.bundle.default_size
    for example in examples():
        packed = pipe(
            example.mask,
            example.prompt,
            num_inference_steps=steps,
            num_images_per_prompt=seeds,
            seed=0,
            output_type="latent",
        ).images
        assert isinstance(packed, Tensor)
        latents.append(packed)
        images.append((np.asarray(pipe.decoder(packed, size, size, "np")) * 255).round().astype(np.uint8))
    return torch.cat(latents), np.concatenate(images)


def drift(images: Bytes, exact: Bytes, latents: Tensor, exact_latents: Tensor, labels: Bytes) -> dict[str, float]:
    """How far images lie from the exact ones."""
    judge = DemoJudge()
    found, before = (np.stack(judge.labels(list(x))) for x in (images, exact))
    each = psnr(images, exact)
    return {
        "psnr_mean": float(each.mean()),
        "psnr_worst": float(each.min()),
        "miou": float(np.mean(list(iou(found, labels).values()))),
        "miou_exact": float(np.mean(list(iou(before, labels).values()))),
        "colour_shift_worst": colour_shift(images, exact, labels),
        "latents_rms": latents_error(latents, exact_latents),
    }


def of_the_demo(seeds: int, steps: int) -> dict[str, dict[str, float]]:
    """The drift of every format, computed in both ways."""
    exact_latents, exact = draw(Pipeline("demo", "cpu", "fp32"), seeds, steps)
    labels = np.concatenate([np.repeat(to_labels(e.mask)[None], seeds, 0) for e in examples()]).astype(np.uint8)
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for weights in STORAGES:
            path = Path(folder) / f"{weights}.safetensors"
            quantize("demo", path, weights, progress=False)
            for way in ("unpacked", "kernels"):
                if way == "kernels":
                    if weights == "int4":  # activations stay as they are: the same numbers
                        continue
                    with activations_rounded():
                        latents, images = draw(Pipeline(path, "cpu", "fp32"), seeds, steps)
                else:
                    latents, images = draw(Pipeline(path, "cpu", "fp32"), seeds, steps)
                result[f"{weights}, {way}"] = drift(images, exact, latents, exact_latents, labels)
                print(weights, way, json.dumps(result[f"{weights}, {way}"]), flush=True)
    return result


def of_outliers() -> dict[str, dict[str, float]]:
    """Products of FLUX's width, whose activations have a few large columns, and so has the weight."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH, generator=g)
    x[:, list(FEW_COLUMNS)] *= TIMES_LARGER
    weight = torch.randn(WIDTH, WIDTH, generator=g) * 0.02
    weight[:, [5, 1500, 3000]] *= 10
    exact = x.double() @ weight.double().t()
    result = {}
    ways: dict[str, tuple[WeightStorage, RowForm | None]] = {
        "int8, rotated": (Int8Storage(rotation=256), RowForm(torch.int8, 256)),
        "int8, not rotated": (Int8Storage(), RowForm(torch.int8)),
        "fp8": (Fp8Storage(), RowForm(torch.float8_e4m3fn)),
        "int4, rank 32": (Int4Storage(), None),
        "int4, no low-rank part": (Int4Storage(rank=0), None),
    }
    for name, (storage, form) in ways.items():
        tensors = quantised(weight, storage)
        rows = x if form is None else rounded_rows(x, form)
        y = rows.double() @ dequantised(tensors, storage).double().t()
        noise = float((y - exact).square().sum() / exact.square().sum())
        result[name] = {
            "weight_db": signal_to_noise(weight, tensors, storage),
            "product_db": float(-10 * np.log10(noise)),
        }
        print(name, json.dumps(result[name]), flush=True)
    return result


def to_markdown(report: dict[str, Any]) -> str:
    """The tables of a report."""
    lines = [
        f"{report['images']} images (eight masks and prompts of the package, {report['seeds']} seeds each), "
        f"{report['steps']} steps, float32 on a CPU, against the same with exact weights:",
        "",
        "| format, way | PSNR, mean | PSNR, worst | mIoU less exact's | largest shift of a region's colour | latents, RMS |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {name} | {r['psnr_mean']:.1f} dB | {r['psnr_worst']:.1f} dB | {100 * (r['miou'] - r['miou_exact']):+.2f} points "
        f"| {r['colour_shift_worst']:.1f} of 255 | {r['latents_rms']:.4f} |"
        for name, r in report["demo"].items()
    ]
    lines += [
        "",
        f"A product at FLUX's width ({WIDTH} columns, {ROWS} rows), in which {len(FEW_COLUMNS)} columns of the activations "
        f"are {TIMES_LARGER} times as large as all others, and three of the weight ten times; signal to noise:",
        "",
        "| format | weight | product |",
        "|---|--:|--:|",
        *(f"| {name} | {r['weight_db']:.1f} dB | {r['product_db']:.1f} dB |" for name, r in report["outliers"].items()),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, default=Path("benchmarks/PRECISION.json"))
    parser.add_argument("--page", type=Path, help="a page in Markdown that gets the tables between its marks")
    parser.add_argument("--seeds", type=int, default=13, help="images of each mask and prompt")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    report: dict[str, Any] = {"seeds": args.seeds, "steps": args.steps, "images": args.seeds * len(examples())}
    report |= {"outliers": of_outliers(), "demo": of_the_demo(args.seeds, args.steps)}
    args.report.write_text(json.dumps(report, indent=1) + "\n")
    if args.page:
        before, rest = args.page.read_text().split(BEGIN)
        args.page.write_text(f"{before}{BEGIN}\n\n{to_markdown(report)}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
