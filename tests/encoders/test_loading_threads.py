"""Models that are loaded by several threads at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from mogle_rt import Pipeline
from tests.torch_api.test_settings import draw

THREADS = 8


def test_eight_threads_load_text_encoders_at_once(tiny_bundle: Path) -> None:
    """A pipeline's first call loads them. While transformers loads, it replaces some functions of the whole process."""
    from transformers import PreTrainedModel

    tie, uniform = PreTrainedModel.tie_weights, torch.nn.init.uniform_
    expected = draw(Pipeline(tiny_bundle, device="cpu", dtype="fp32"))
    start = threading.Barrier(THREADS)

    def load_and_draw(_: int) -> Tensor:
        start.wait(60)
        return draw(Pipeline(tiny_bundle, device="cpu", dtype="fp32"))

    with ThreadPoolExecutor(THREADS) as pool:
        for image in pool.map(load_and_draw, range(THREADS)):
            assert torch.equal(image, expected)
    assert PreTrainedModel.tie_weights is tie
    assert torch.nn.init.uniform_ is uniform
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(draw(Pipeline(tiny_bundle, device="cpu", dtype="fp32")), expected)


def test_modules_of_other_threads_get_their_values(tiny_bundle: Path) -> None:
    """A VAE is built without initial values. Layers that other threads make at that time still get theirs."""
    from mogle_rt.bundle.bundle import Bundle
    from mogle_rt.encoders.vae import autoencoder

    config, stop, built = Bundle(tiny_bundle).config.vae, threading.Event(), 0

    def build() -> None:
        nonlocal built
        while not stop.is_set():
            autoencoder(config)
            built += 1

    other = threading.Thread(target=build)
    other.start()
    before = torch.nn.init.kaiming_uniform_
    while built < 3:
        assert torch.nn.init.kaiming_uniform_ is before
        assert float(torch.nn.Linear(8, 8).weight.detach().std()) > 0.05
    stop.set()
    other.join()
