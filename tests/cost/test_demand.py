"""The memory that a plan says a job needs equals what is counted when the same code runs without weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mogle_rt.bundle import schema
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import FLUX_DEV, ModelConfig
from mogle_rt.cost.demand import Run, demand
from mogle_rt.cost.estimate import estimate
from mogle_rt.cost.job import FLUX_BUNDLE, FLUX_TEXT, Job, WeightlessBundle
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.fast.settings import FastConfig
from mogle_rt.memory.planner import make_plan
from mogle_rt.model.loading import plan_layers
from tests.conftest import needs_triton

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
VAE = 83_819_683  # parameters of FLUX's
SMALL = replace(FLUX_DEV, num_layers=2, num_single_layers=3)


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "size", "batch", "tokens", "fast"),
    [
        (torch.bfloat16, 512, 1, 512, None),
        (torch.bfloat16, 1024, 1, 512, None),
        (torch.float32, 256, 3, 77, None),
        (torch.bfloat16, 1024, 2, 512, FastConfig(steps_mask="fast", refresh_every=4)),
    ],
    ids=str,
)
def test_planned_peaks_are_the_counted_ones(
    dtype: torch.dtype, size: int, batch: int, tokens: int, fast: FastConfig | None
) -> None:
    """At FLUX's width, the memory of the weights and the peak of each stage are planned to within 2 %."""
    config = replace(FLUX_BUNDLE, transformer=SMALL)
    ranks = dict.fromkeys(schema.lora_modules(SMALL), 4)
    shape: dict[str, Any] = {"height": size, "width": size, "batch": batch, "text_tokens": tokens, "fast": fast}
    counted = estimate(Job(config=config, ranks=ranks, dtype=dtype, **shape)).engine
    planned = demand(WeightlessBundle(config, ranks), Run(device=CUDA, dtype=dtype, vae=VAE, text=FLUX_TEXT, **shape))
    weights = planned.always + sum(s.resident for s in planned.sublayers) + planned.vae
    assert weights == pytest.approx(counted.resident, rel=0.005)
    held = weights + planned.run
    for stage, peak in (
        ("encode", weights + planned.encode),
        ("step", held + planned.step),
        ("decode", held + planned.decode),
    ):
        assert peak == pytest.approx(getattr(counted, stage).peak, rel=0.02), stage


def test_what_fast_modes_keep_at_full_size() -> None:
    """Keys and values of 1024 rows in 57 blocks, 2 bytes each; of velocities, two in float32."""
    source = WeightlessBundle(FLUX_BUNDLE, dict.fromkeys(schema.lora_modules(FLUX_DEV), 4))

    def of(fast: FastConfig | None) -> int:
        shape = {"height": 512, "width": 512, "vae": VAE}
        return demand(source, Run(device=CUDA, dtype=torch.bfloat16, fast=fast, **shape)).run  # type: ignore[arg-type]

    assert of(FastConfig(refresh_every=4)) - of(None) == 57 * 1024 * 2 * 3072 * 2 == 717_225_984
    assert of(FastConfig(steps_mask="fast")) - of(None) == 2 * 1024 * 64 * 4 + 4
    assert of(FastConfig(steps_mask="fast", order=0)) == of(None)
    assert of(FastConfig(max_change=0.1)) - of(None) == 3 * 1024 * 64 * 4


def test_full_size_takes_no_time_to_plan() -> None:
    """The plan of the released model in bf16: 17.4 GB for the steps, 6.6 for modulations, 9.8 for text."""
    source = WeightlessBundle(FLUX_BUNDLE, dict.fromkeys(schema.lora_modules(FLUX_DEV), 4))
    needed = demand(source, Run(device=CUDA, dtype=torch.bfloat16, height=512, width=512, vae=VAE, text=FLUX_TEXT))
    assert needed.always + sum(s.resident for s in needed.sublayers) == pytest.approx(17.39e9, rel=0.005)
    assert needed.modulation == pytest.approx(6.56e9, rel=0.005)
    assert needed.text == 2 * sum(FLUX_TEXT.values())
    plan = make_plan(needed, device="cuda", room=7 * 10**9)
    assert 7e9 - 0.61e9 < plan.peak <= 7e9  # two more sublayers, of 0.3 GB at most, would not fit


@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("weights", ["packed", "plain"])
def test_planned_weights_are_those_that_are_loaded(kernels: str, weights: str) -> None:
    """Each weight's planned shape and format are those of the loaded layer, the LoRA's extra rows and columns included,
    and so is the sum of their bytes, for the demo's bundle."""
    bundle = Bundle("demo")
    engine = TorchEngine(bundle, CPU, torch.float32, ModelConfig(), kernels=kernels, weights=weights)
    plans = plan_layers(bundle, CPU, torch.float32, weight_format=weights, fused=engine.ops.RIDING)
    for name, layer in engine.transformer.layers():
        assert layer.weight.shape == plans[name].shape, name
        assert layer.weight.name == plans[name].weight_format.name, name
    run = Run(device=CPU, dtype=torch.float32, height=128, width=128, kernels=kernels, weight_format=weights)
    needed = demand(bundle, run)
    held = sum(engine.transformer.bytes_by_format().values())
    assert needed.always + sum(s.resident for s in needed.sublayers) == pytest.approx(held, rel=0.05)


def test_views_of_the_file_take_no_memory() -> None:
    """In the stored dtype, a CPU uses plain weights where they lie in the mapped file."""
    bundle = Bundle("demo")
    stored = bundle.tensors["transformer.x_embedder.weight"].dtype
    run = Run(device=CPU, dtype=stored, height=128, width=128, weight_format="plain", kernels="torch")
    converted = replace(run, dtype=torch.float32 if stored != torch.float32 else torch.bfloat16)
    views, copies = (sum(s.resident for s in demand(bundle, r).sublayers) for r in (run, converted))
    assert views < copies / 4
