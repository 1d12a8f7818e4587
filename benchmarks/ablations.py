"""The paper's ablations, of two kinds: a part is taken away from trained weights, or weights are trained without it.

    python -m benchmarks.ablations --retrained build/demo --report build/demo/QUALITY.json

This command measures the second kind and adds it to the report of `benchmarks.quality`. The folder must hold two bundles
that were trained equally long from the same weights: full.safetensors with the ordinary gate, and scalar_gate.safetensors
with a gate that has one weight for each image and expert.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from benchmarks.quality_measures import Cases, Judge, draw, load_cases, without_regions
from examples.demo_checkpoint.export import read_weights, unpack, write_bundle
from mogle_rt import Pipeline
from mogle_rt.bundle.bundle import Bundle


def ablated(bundle: str) -> dict[str, Pipeline]:
    """A pipeline for each part that is taken away, by the name of the ablation."""
    result = {
        "regions black (global expert sees the mask)": Pipeline(bundle, "cpu", "fp32"),
        "scalar gate": Pipeline(bundle, "cpu", "fp32", model_config={"weight_is_scale": True}),
    }
    first = result["regions black (global expert sees the mask)"]
    first.conditioner = without_regions(first)  # type: ignore[assignment]
    config = Bundle(bundle).config.transformer.to_dict()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        unpack(bundle, folder)
        for name in ("no gate (plain sum)", "no branch LoRA"):
            parts = read_weights(bundle)
            if name == "no branch LoRA":
                parts["lora"] = {n: torch.zeros_like(t) for n, t in parts["lora"].items()}
            else:
                parts["mogle"] = {n: t for n, t in parts["mogle"].items() if not n.startswith("gating.")}
            path = write_bundle(parts, config, folder / "vae", folder / "text", folder / f"{len(result)}.safetensors")
            result[name] = Pipeline(path, "cpu", "fp32")
    for pipe in result.values():
        pipe.set_progress_bar_config(disable=True)
    return result


def retrained(folder: Path, cases: Cases) -> dict[str, object]:
    """The measures of both retrained bundles, by name."""
    judge = Judge(cases.images)
    result: dict[str, object] = {}
    for name, file, scalar in (("gate", "full", False), ("scalar gate", "scalar_gate", True)):
        config = {"weight_is_scale": True} if scalar else None
        pipe = Pipeline(folder / f"{file}.safetensors", "cpu", "fp32", model_config=config)
        pipe.set_progress_bar_config(disable=True)
        result[f"ablation: retrained, {name}"] = judge(draw(pipe, cases, 28)[0], cases)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--retrained", type=Path, default=Path("build/demo"))
    parser.add_argument("--renders", type=Path, default=Path("build/demo/held_out"))
    parser.add_argument("--report", type=Path, default=Path("build/demo/QUALITY.json"))
    parser.add_argument("--count", type=int, default=50)
    args = parser.parse_args()
    report = json.loads(args.report.read_text())
    report |= retrained(args.retrained, load_cases(args.renders, count=args.count))
    args.report.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
