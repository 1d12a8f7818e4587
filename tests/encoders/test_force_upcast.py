"""A VAE in float16 whose configuration (`force_upcast`) says that its activations are too large for this dtype."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mogle_rt import Pipeline
from mogle_rt.bundle import schema
from mogle_rt.config import FLUX_DEV
from mogle_rt.cost.estimate import estimate
from mogle_rt.cost.job import FLUX_BUNDLE, Job
from mogle_rt.encoders.vae import vae_dtype
from tests.checkpoints import VAE, write_checkpoint
from tests.torch_api.test_settings import draw


@pytest.mark.parametrize(
    ("said", "expected"), [({}, True), ({"force_upcast": True}, True), ({"force_upcast": False}, False)]
)
def test_float16(said: dict[str, Any], expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in diffusers, `force_upcast` is true where the configuration doesn't have it."""
    monkeypatch.setitem(VAE, "force_upcast", said.get("force_upcast"))
    if not said:
        monkeypatch.delitem(VAE, "force_upcast")
    bundle = write_checkpoint(tmp_path, text_encoders=True).convert(tmp_path / "tiny.safetensors")
    pipe = Pipeline(bundle, device="cpu", dtype="fp16")
    wanted = torch.float32 if expected else torch.float16
    assert {p.dtype for p in pipe.vae.parameters()} == {wanted}
    image = draw(pipe)
    assert image.dtype == wanted
    assert bool(torch.isfinite(image).all())
    reference = draw(Pipeline(bundle, device="cpu", dtype="fp32"))
    assert float((image.float() - reference).abs().max()) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_stay(dtype: torch.dtype) -> None:
    assert vae_dtype({"force_upcast": True}, dtype) == dtype


def test_the_estimate_counts_it() -> None:
    """A VAE in float32 takes four bytes for a parameter, and its activations are twice as large as in float16."""
    blocks = replace(FLUX_DEV, num_layers=1, num_single_layers=1)

    def job(upcast: bool) -> Job:
        config = replace(FLUX_BUNDLE, transformer=blocks, vae=dict(FLUX_BUNDLE.vae) | {"force_upcast": upcast})
        return Job(
            config=config,
            ranks=dict.fromkeys(schema.lora_modules(blocks), 4),
            text={},
            dtype=torch.float16,
            height=128,
            width=128,
        )

    upcast, half = estimate(job(True)), estimate(job(False))
    assert upcast.engine.resident - half.engine.resident == 2 * half.parameters["vae"]
    assert upcast.reference.resident - half.reference.resident == 2 * half.parameters["vae"]
    # (In float16 a decoder moves somewhat more than half: PyTorch upsamples in float32.)
    assert upcast.engine.encode.moved == pytest.approx(2 * half.engine.encode.moved, rel=0.01)
    assert upcast.engine.decode.moved > half.engine.decode.moved
    assert upcast.engine.decode.flops == half.engine.decode.flops
