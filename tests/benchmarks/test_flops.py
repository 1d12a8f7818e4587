"""The benchmarks' count of FLOPs, on the operations that a GPU runs: it is the engine's own, and near the closed form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import flops, products
from benchmarks.sizes import SIZES
from mogle_rt.bundle import schema
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import NUM_EXPERTS, ModelConfig
from mogle_rt.cost.counting import counting
from mogle_rt.cost.job import FLUX_BUNDLE, WeightlessBundle
from mogle_rt.engines.contract import Conditions
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.loop.schedule import make_schedule
from mogle_rt.ops import attention
from tests.checkpoints import write_checkpoint
from tests.conftest import needs_triton

META = torch.device("meta")


def empty(*shape: int) -> Tensor:
    return torch.empty(*shape, device=META)


@pytest.mark.parametrize("kernels", [pytest.param("triton", marks=needs_triton), "torch"])
@pytest.mark.parametrize(("name", "pixels", "batch"), [("tiny", 64, 4), ("width 256", 128, 1), ("FLUX width", 512, 1)])
def test_a_steps_flops(name: str, pixels: int, batch: int, kernels: str) -> None:
    """The counted FLOPs lie within the bounds that the benchmark of a step asserts."""
    size, side = SIZES[name], pixels // 16
    transformer = size.transformer
    ranks = dict.fromkeys(schema.lora_modules(transformer), 4)
    bundle = WeightlessBundle(replace(FLUX_BUNDLE, transformer=transformer), ranks)
    engine = TorchEngine(bundle, META, torch.float32, ModelConfig(), kernels=kernels)
    conditions = Conditions.from_mask_latents(
        empty(batch, NUM_EXPERTS, side**2, 64),
        prompt_embeds=empty(batch, size.text, transformer.joint_attention_dim),
        pooled_prompt_embeds=empty(batch, transformer.pooled_projection_dim),
        guidance_scale=3.5,
        grid=(side, side),
    )
    engine.prepare(conditions, make_schedule(bundle.config.scheduler, 4, side**2))
    with torch.inference_mode():
        with counting() as counter:
            engine.prepared.advance()
            expected = counter.take().flops
        _, counted = flops.count(engine.prepared.advance)
    assert counted == expected
    needed = batch * flops.step(transformer, size.text, side**2)
    assert needed < counted < (1.3 if name == "tiny" else 1.06) * needed  # ranks are filled up to 16


def test_a_call_may_have_no_flops() -> None:
    x = torch.ones(2)
    assert flops.count(lambda: x) == (x, 0)


@pytest.mark.parametrize("whole_scores", [True, False], ids=["products", "fused"])
def test_whatever_has_flops_is_timed_as_a_product(
    whole_scores: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the time in the results for "nothing but products and attention" would be too short."""
    if not whole_scores:
        monkeypatch.setattr(attention, "WHOLE_SCORES", 0)
    bundle = Bundle(write_checkpoint(tmp_path).convert(tmp_path / "b.safetensors"))
    engine = TorchEngine(bundle, torch.device("cpu"), torch.float32, ModelConfig())
    transformer, tokens = bundle.config.transformer, 6
    conditions = Conditions.from_mask_latents(
        torch.randn(1, NUM_EXPERTS, tokens, 64),
        prompt_embeds=torch.randn(1, 4, transformer.joint_attention_dim),
        pooled_prompt_embeds=torch.randn(1, transformer.pooled_projection_dim),
        guidance_scale=3.5,
        grid=(2, 3),
    )
    engine.prepare(conditions, make_schedule(bundle.config.scheduler, 4, tokens))
    engine.start(torch.randn(1, tokens, 64), 0)
    with torch.inference_mode():
        _, operations = flops.by_operation(engine.prepared.advance)
    assert set(operations) <= products.PRODUCTS
    assert (torch.ops.aten.baddbmm in operations) == whole_scores
