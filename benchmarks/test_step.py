"""Times the experts and the gate of a step, and a whole step with its Euler update.

What no step changes is prepared before and is not timed.
"""

from __future__ import annotations

import pytest

from benchmarks import flops, products
from benchmarks.conftest import ModelsOf
from benchmarks.side_by_side import SideBySide
from benchmarks.sizes import Job
from mogle_rt.config import NUM_EXPERTS
from mogle_rt.masks import Labels


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("pixels", [128, 256, 512])
def test_experts_and_gate(pixels: int, batch: int, models: ModelsOf, mask: Labels, compare: SideBySide) -> None:
    job = Job(models("width 256"), mask, pixels, batch)
    job.prepare()
    # Latents, the gate's constant input and the experts' outputs, which masks may share, are read; condition tokens are
    # written.
    moved = 3 * job.noise.nbytes + NUM_EXPERTS * job.noise[0].nbytes
    compare(
        "experts and gate",
        f"{pixels} px, batch {batch}",
        job.engine_condition,
        job.baseline_condition,
        moved=moved,
        budget=2,
    )


@pytest.mark.parametrize(
    ("name", "pixels", "batch"),
    [
        ("tiny", 64, 1),
        ("tiny", 64, 4),
        ("width 256", 128, 1),
        ("width 256", 128, 4),
        ("width 256", 256, 1),
        ("width 256", 256, 4),
        ("FLUX width", 512, 1),
        pytest.param("FLUX width", 512, 4, marks=pytest.mark.slow),
    ],
)
def test_step(name: str, pixels: int, batch: int, models: ModelsOf, mask: Labels, compare: SideBySide) -> None:
    job = Job(models(name), mask, pixels, batch)
    job.prepare()
    needed = batch * flops.step(job.models.size.transformer, job.models.size.text, job.tokens)
    weights = job.models.resident_bytes("transformer", "lora", "mogle")
    compare(
        "step",
        job.title,
        job.engine_step,
        job.baseline_step,
        eager=job.eager_step,
        moved=weights,
        flops_needed=needed,
        product=job.product,
        core=products.within(job.eager_step, compare.machine.clock),
    )
    # LoRA and experts come on top. Only in narrow models do they matter.
    assert compare.benchmark.extra_info["engine_flops"] == pytest.approx(needed, rel=0.25 if name == "tiny" else 0.05)
