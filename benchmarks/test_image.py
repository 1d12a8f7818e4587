"""Times whole images, from labels and text embeddings to pixels."""

from __future__ import annotations

import pytest

from benchmarks.conftest import ModelsOf
from benchmarks.side_by_side import SideBySide
from benchmarks.sizes import Job
from mogle_rt.masks import Labels


@pytest.mark.parametrize(
    ("name", "pixels", "batch", "steps"),
    [
        ("tiny", 64, 1, 28),
        ("tiny", 64, 4, 28),
        ("width 256", 128, 1, 28),
        ("width 256", 128, 4, 28),
        ("width 256", 256, 1, 28),
        ("width 256", 256, 4, 8),
        pytest.param("FLUX width", 512, 1, 2, marks=pytest.mark.slow),
        pytest.param("FLUX width", 512, 4, 2, marks=pytest.mark.slow),
    ],
)
def test_image(
    name: str, pixels: int, batch: int, steps: int, models: ModelsOf, mask: Labels, compare: SideBySide
) -> None:
    job = Job(models(name), mask, pixels, batch, steps)
    weights = job.models.resident_bytes("transformer", "lora", "mogle")
    compare(
        "image",
        f"{job.title}, {steps} steps",
        job.engine_images,
        job.baseline_images,
        eager=lambda: job.engine_images(job.models.eager_pipeline),
        before=job.models.forget_masks,
        moved=weights,
        times=steps,
        product=job.product,
    )
