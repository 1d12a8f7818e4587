"""Times several steps, and whole images, by onnxruntime and by the torch engine, which takes the baseline's place."""

from __future__ import annotations

import pytest
from torch import Tensor

from benchmarks import flops
from benchmarks.conftest import ModelsOf
from benchmarks.side_by_side import SideBySide
from benchmarks.sizes import Job, Models
from mogle_rt import DeviceError, Pipeline
from mogle_rt.engines.contract import Engine
from mogle_rt.masks import Labels

MODEL = "width 256"
STEPS = 8  # a single step is too short: a busy machine disturbs it too much
SIZES = [(128, 1), (128, 4), (256, 1), (256, 4)]


def onnx_pipeline(models: Models) -> Pipeline:
    """The pipeline on onnxruntime; skips where that does not have this device and dtype."""
    try:
        return models.onnx_pipeline
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("pixels", "batch"), SIZES)
def test_steps(pixels: int, batch: int, models: ModelsOf, mask: Labels, compare: SideBySide) -> None:
    job = Job(models(MODEL), mask, pixels, batch)
    exported = onnx_pipeline(job.models).engine
    exported.prepare(job.conditions, job.schedule)
    job.prepare()

    def run(engine: Engine) -> Tensor:
        engine.start(job.noise)
        for _ in range(STEPS):
            engine.advance()
        return engine.latents()

    compare(
        "engines",
        f"{job.title}, {STEPS} steps",
        lambda: run(exported),
        lambda: run(job.models.engine),
        moved=job.models.resident_bytes("transformer", "lora", "mogle"),
        times=STEPS,
        flops_needed=STEPS * batch * flops.step(job.models.size.transformer, job.models.size.text, job.tokens),
        product=job.product,
    )


@pytest.mark.parametrize("pixels", [128, 256])
def test_image(pixels: int, models: ModelsOf, mask: Labels, compare: SideBySide) -> None:
    job = Job(models(MODEL), mask, pixels, batch=1)
    exported = onnx_pipeline(job.models)

    def by_torch() -> Tensor:
        job.models.forget_masks()
        return job.engine_images()

    compare(
        "engines",
        f"{job.title}, image of {job.steps} steps",
        lambda: job.engine_images(exported),
        by_torch,
        before=exported.conditioning_cache.clear,
        moved=job.models.resident_bytes("transformer", "lora", "mogle"),
        times=job.steps,
        flops_needed=flops.count(by_torch)[1],  # PyTorch's counter does not see what onnxruntime does
        product=job.product,
    )
