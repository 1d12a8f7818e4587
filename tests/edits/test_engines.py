"""Edits through exported graphs give the same images as through PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mogle_rt import Pipeline
from tests.conftest import assert_close

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from mogle_rt.export.exporter import export

SIZE = 64


def test_onnxruntime_edits_as_torch_does(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = export(tiny_bundle, tmp_path, dtype="fp32")
    before = np.zeros((SIZE, SIZE), dtype=np.uint8)
    before[16:48, 16:48] = 1
    after = before.copy()
    after[2:20, 20:44] = 13
    image = torch.rand(1, 3, SIZE, SIZE)
    options: dict[str, Any] = {"strength": 0.7, "num_inference_steps": 4, "seed": 3, "output_type": "latent"}
    results: list[Any] = []
    for pipe in (
        Pipeline(tiny_bundle, device="cpu", dtype="fp32"),
        Pipeline(tiny_bundle, device="cpu", engine="onnxruntime", engine_path=folder),
    ):
        results.append(pipe.edit(image, before, after, "black hair", **options).images)
        pixels: Any = pipe.edit(image, before, after, "black hair", **options | {"output_type": "pt"}).images
        assert torch.equal(pixels[..., 40:, :], image[..., 40:, :])
        assert not torch.equal(pixels, image)
    assert_close(results[1], results[0], rms=1e-5)
