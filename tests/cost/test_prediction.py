"""The plan and the predicted time that `mogle-rt cost` prints for a card."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mogle_rt.bundle import schema
from mogle_rt.config import FLUX_DEV
from mogle_rt.cost.counting import Count
from mogle_rt.cost.estimate import estimate
from mogle_rt.cost.gpus import find_gpu
from mogle_rt.cost.job import FLUX_BUNDLE, Job
from mogle_rt.cost.prediction import plan_on, predicted_step_ms
from mogle_rt.errors import InsufficientMemoryError
from mogle_rt.memory.budget import CUDA_BYTES
from tests.conftest import needs_triton
from tests.cost.test_cost import run

VAE = 83_819_683  # parameters of FLUX's


def flux(blocks: int, single_blocks: int) -> Job:
    transformer = replace(FLUX_DEV, num_layers=blocks, num_single_layers=single_blocks)
    ranks = dict.fromkeys(schema.lora_modules(transformer), 4)
    return Job(config=replace(FLUX_BUNDLE, transformer=transformer), ranks=ranks, kernels="torch")


def test_a_card_s_plan() -> None:
    """The plan is the one that a pipeline makes, within the card's memory or the part of it that may be used."""
    job, card = flux(19, 38), find_gpu("RTX 3060")
    whole, less = plan_on(job, card, None, VAE), plan_on(job, card, 8 * 10**9, VAE)
    assert whole.room + CUDA_BYTES == 12 * 2**30
    assert less.room + CUDA_BYTES == 8 * 10**9
    assert 0 < len(whole.streamed) < len(less.streamed) < 76
    assert plan_on(job, card, 10**12, VAE) == whole
    assert plan_on(job, find_gpu("H100 SXM"), None, VAE).streamed == ()
    with pytest.raises(
        InsufficientMemoryError, match=r"needs at least 2\.\d GB of GPU memory, and 1\.5 GB may be used"
    ):
        plan_on(job, card, 15 * 10**8, VAE)


def test_weights_in_few_bits_are_planned_for() -> None:
    """A card that streams most of the 16-bit weights keeps those of four bits."""
    job, card = flux(19, 38), find_gpu("RTX 4060")
    plans = {weights: plan_on(replace(job, weights=weights), card, None, VAE) for weights in (None, "int8", "int4")}
    streamed = [len(plan.streamed) for plan in plans.values()]
    assert streamed[0] > 2 * streamed[1] > 0 == streamed[2]
    assert plans["int4"].resident < 5.2 * 2**30


@needs_triton
def test_products_of_eight_bits_are_predicted_at_their_rate() -> None:
    job = replace(flux(1, 1), kernels="triton", height=64, width=64, text_tokens=16)
    card, steps = find_gpu("H100 SXM"), {}
    for weights in (None, "int8", "fp8", "int4"):
        one = replace(job, weights=weights)
        step, plan = estimate(one).engine.step, plan_on(one, card, None, VAE)
        steps[weights] = predicted_step_ms(card, step, plan, 2, weights)
        assert (step.eight_bit_flops > 0.9 * step.flops) == (weights in ("int8", "fp8"))
    assert steps["int8"] == steps["fp8"] == pytest.approx(steps[None] / 2, rel=0.1)
    assert steps["int4"] == pytest.approx(steps[None], rel=0.05)


@pytest.mark.parametrize(("name", "link"), [("RTX 3060", 10.0), ("RTX 4060", 10.0)])
def test_the_longer_of_arithmetic_and_copies(name: str, link: float) -> None:
    card, job = find_gpu(name), flux(19, 38)
    plan = plan_on(job, card, 4 * 10**9, VAE)
    copies = plan.streamed_bytes / link / 1e6
    assert predicted_step_ms(card, Count(flops=0), plan, 2) == pytest.approx(copies)
    much = int(10 * copies * card.half_tflops * 1e9)
    assert predicted_step_ms(card, Count(flops=much), plan, 2) == pytest.approx(10 * copies / 0.6)
    # Where the link is slower than the host's memory, it limits the copies.
    assert predicted_step_ms(replace(card, link=5.0), Count(), plan, 2) == pytest.approx(copies * link / 4.0)


def test_the_command_prints_the_plan(tiny_bundle: Path) -> None:
    status, out, err = run(tiny_bundle, "--height", 64, "--width", 48, "--gpu", "L4", "--max-memory", "1.2GB")
    assert (status, err) == (0, "")
    assert "plan: 1.1 GB of 1.2 GB GPU memory at the peak (1.1 GB set aside)" in out
    assert "predicted, not measured: " in out
    status, out, _ = run(tiny_bundle, "--height", 64, "--width", 48, "--gpu", "L4", "--json")
    report = json.loads(out)
    assert report["plan"]["streamed"] == []
    assert report["plan"]["predicted_step_ms"] > 0
    status, out, _ = run(tiny_bundle, "--height", 64, "--width", 48, "--gpu", "L4", "--max-memory", "1GB")
    assert "no plan fits L4: this job needs at least 1." in out
    status, out, err = run(tiny_bundle, "--max-memory", "1GB")
    assert status == 1
    assert "--max-memory needs --gpu" in err
