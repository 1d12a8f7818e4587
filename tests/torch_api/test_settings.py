"""A caller's settings of PyTorch change no result, and are as they were afterwards."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mogle_rt import Pipeline
from mogle_rt.torch_api.settings import settled

SIZE = 64


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(before)


@contextmanager
def product_precision(precision: str) -> Iterator[None]:
    """On a CPU with the instructions for it, "medium" lets oneDNN multiply float32 in bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


OUTER: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "meta": lambda: default_device("meta"),
    "meta context": lambda: torch.device("meta"),
    "medium": lambda: product_precision("medium"),
}


def draw(pipe: Pipeline, prompt: str = "a woman", **options: Any) -> Tensor:
    """An image, in the settings of the caller."""
    labels = np.zeros((SIZE, SIZE), np.uint8)
    labels[16:48, 8:40], labels[20:30, 20:30] = 1, 13
    generator = torch.Generator("cpu").manual_seed(3)
    settings: dict[str, Any] = {"num_inference_steps": 2, "height": SIZE, "width": SIZE, "output_type": "pt"}
    images = pipe(labels, prompt, generator=generator, **settings | options).images
    assert isinstance(images, Tensor)
    return images


@pytest.fixture(scope="module")
def expected(tiny_bundle: Path) -> dict[str, Tensor]:
    """Images by prompt, of a fresh pipeline in PyTorch's own settings."""
    pipe = Pipeline(tiny_bundle, device="cpu", dtype="fp32")
    return {prompt: draw(pipe, prompt) for prompt in ("a woman", "an old man")}


@pytest.mark.parametrize("name", OUTER)
def test_outer_settings_change_nothing(name: str, tiny_bundle: Path, expected: dict[str, Tensor]) -> None:
    """The pipeline is made, called, and fills its caches within them; what it kept serves a call outside of them."""
    with OUTER[name]():
        pipe = Pipeline(tiny_bundle, device="cpu", dtype="fp32")
        within = draw(pipe)
    assert within.dtype == torch.float32
    assert torch.equal(within, expected["a woman"])
    hits = pipe.conditioning_cache.hits
    assert torch.equal(draw(pipe), expected["a woman"])
    assert pipe.conditioning_cache.hits > hits  # this was made within
    assert torch.equal(draw(pipe, "an old man"), expected["an old man"])
    with OUTER[name]():
        assert torch.equal(draw(pipe, "an old man"), expected["an old man"])


@pytest.mark.parametrize("name", OUTER)
@pytest.mark.parametrize("options", [{"condition_scale": 2.0}, {"mask_posterior": "sample"}, {"position_scale": 2.0}], ids=str)
def test_options_neither(name: str, options: dict[str, Any], tiny_bundle: Path) -> None:
    expected = draw(Pipeline(tiny_bundle, device="cpu", dtype="fp32"), **options)
    with OUTER[name]():
        assert torch.equal(draw(Pipeline(tiny_bundle, device="cpu", dtype="fp32"), **options), expected)
