"""The memory that a plan says a job needs equals what is counted when the same code runs without weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mogle_rt import Pipeline
from mogle_rt.bundle import schema
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import FLUX_DEV, NUM_EXPERTS, ModelConfig
from mogle_rt.cost.counting import counting
from mogle_rt.cost.demand import Run, demand
from mogle_rt.cost.estimate import estimate
from mogle_rt.cost.job import FLUX_BUNDLE, FLUX_TEXT, Job, WeightlessBundle
from mogle_rt.engines.contract import Conditions
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.fast.settings import FastConfig
from mogle_rt.loop.blend import Kept
from mogle_rt.loop.schedule import make_schedule, step_capacity
from mogle_rt.memory.planner import Demand, make_plan
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


@needs_triton
@pytest.mark.parametrize("batch", [1, 3])
def test_what_an_edit_holds_is_planned(batch: int) -> None:
    """The steps of an edit, run without values: the bytes that it holds more than other runs are those of the plan."""
    ranks = dict.fromkeys(schema.lora_modules(SMALL), 4)
    source, meta = WeightlessBundle(replace(FLUX_BUNDLE, transformer=SMALL), ranks), torch.device("meta")
    shape: dict[str, Any] = {"height": 256, "width": 256, "batch": batch, "steps": 4, "text_tokens": 7}

    def empty(*sizes: int) -> Tensor:
        return torch.empty(*sizes, device=meta, dtype=torch.bfloat16)

    def counted(*, edit: bool) -> int:
        with counting() as counter, torch.inference_mode():
            engine = TorchEngine(source, meta, torch.bfloat16, ModelConfig())
            parts = {name: empty(batch, 256, 64) for name in ("original", "difference", "amount")} if edit else {}
            kept = Kept(**parts, sigmas=torch.empty(4, device=meta)) if edit else None
            conditions = Conditions.from_mask_latents(
                empty(batch, NUM_EXPERTS, 256, 64),
                prompt_embeds=empty(batch, 7, SMALL.joint_attention_dim),
                pooled_prompt_embeds=empty(batch, SMALL.pooled_projection_dim),
                guidance_scale=3.5,
                grid=(16, 16),
                kept=kept,
            )
            engine.prepare(conditions, make_schedule(FLUX_BUNDLE.scheduler, 4, 256))
            counter.take()
            engine.advance()
            return counter.take().peak

    of_edit, of_other = (
        demand(source, Run(device=CUDA, dtype=torch.bfloat16, edit=edit, **shape)).run for edit in (True, False)
    )
    assert of_edit - of_other == 7 * batch * 256 * 64 * 2
    # Besides, there are noise levels: 4 of the call, their copy for as many steps as there is room for, and one selected.
    levels = 4 * (4 + step_capacity(4) + 1)
    assert counted(edit=True) - counted(edit=False) == of_edit - of_other + levels


@pytest.mark.parametrize("edit", [True, False])
def test_edits_are_planned_as_edits(edit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that keeps a part of an image has its latents in its plan, and on a CPU its pixels."""
    asked: list[Run] = []

    def noted(source: Bundle, run: Run) -> Demand:
        asked.append(run)
        return demand(source, run)

    monkeypatch.setattr("mogle_rt.calls.memory.demand", noted)
    pipe = Pipeline("demo", "cpu", "fp32")
    image, mask = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    mask[:32] = 13
    shapes = pipe.bundle.config.transformer
    embeds = {
        "prompt_embeds": torch.zeros(1, 4, shapes.joint_attention_dim),
        "pooled_prompt_embeds": torch.zeros(1, shapes.pooled_projection_dim),
    }
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", **embeds}
    if edit:
        pipe.inpaint(image, mask, regions="hair", **options)
    else:
        pipe.image_to_image(image, mask, **options)
    assert asked[-1].edit == edit
    more = demand(pipe.bundle, asked[-1]).run - demand(pipe.bundle, replace(asked[-1], edit=False)).run
    assert more == (4 * (7 * 16 * 64 + 4 * 64 * 64) if edit else 0)


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
