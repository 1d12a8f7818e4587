"""The paper's ablations on trained weights: bundles of the same weights with a part taken away."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks.quality import without_regions
from examples.demo_checkpoint.export import read_weights, unpack, write_bundle
from mogle_rt import Pipeline
from mogle_rt.checkpoint import Bundle


def ablated(bundle: str) -> dict[str, Pipeline]:
    """Pipelines by what they lack."""
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
