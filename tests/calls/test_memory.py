"""A pipeline in little memory draws the same images to the bit, and one line says where memory runs out."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mogle_rt import Pipeline
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.calls.decoding import Decoder
from mogle_rt.config import FLUX_DEV
from mogle_rt.encoders.text import TextEncoders
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.errors import ConfigError, InsufficientMemoryError
from mogle_rt.loop.step import Step
from mogle_rt.memory.budget import PROCESS_BYTES, Budget
from mogle_rt.memory.planner import KEPT, STREAMED
from mogle_rt.model.mixture import MixtureOfExperts
from tests.sparse_bundles import write_sparse_bundle

CPU = torch.device("cpu")
PROMPT = "an old man with a grey beard"


def drawn(pipe: Pipeline, size: int = 64, **options: Any) -> Any:
    mask = np.kron(np.array([[0, 13], [1, 10]], dtype=np.uint8), np.ones((32, 32), dtype=np.uint8))
    call: dict[str, Any] = {"num_inference_steps": 2, "seed": 3, "height": size, "width": size, "output_type": "np"}
    return pipe(mask, PROMPT, **call | options).images


@pytest.fixture(scope="module")
def shared() -> Pipeline:
    return Pipeline("demo", "cpu")


@pytest.fixture(scope="module")
def expected(shared: Pipeline) -> Any:
    return drawn(shared)


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The bytes that may be used, which a test can change."""
    room = {"room": 10**12}
    monkeypatch.setattr("mogle_rt.calls.memory.budget_for", lambda device, asked: Budget(room["room"], 0))
    return room


def test_less_memory_gives_the_same_image(expected: Any, budget: dict[str, int]) -> None:
    """The budget is set to a byte less than the last plan took, again and again, until no plan is left."""
    pipe = Pipeline("demo", "cpu")
    assert np.array_equal(drawn(pipe), expected)
    assert (pipe.plan.streamed, pipe.plan.text) == ((), KEPT)
    plans = set()
    while True:
        budget["room"] = pipe.plan.peak - 1
        try:
            image = drawn(pipe)
        except InsufficientMemoryError:
            break
        assert np.array_equal(image, expected)
        plans.add((len(pipe.plan.streamed), pipe.plan.text, pipe.plan.takes_turns))
        pipe.prompt_cache.clear()
    assert {streamed for streamed, *_ in plans} == {0, 4, 6, 8}  # two slots take as much as two sublayers
    assert {text for _, text, _ in plans} == {STREAMED}
    assert (8, STREAMED, True) in plans
    budget["room"] = 10**12
    assert np.array_equal(drawn(pipe), expected)


def test_a_new_pipeline_in_little_memory(expected: Any, budget: dict[str, int]) -> None:
    """A pipeline opens even where its default image can't fit into memory, since a smaller image may fit."""
    budget["room"] = 1
    pipe = Pipeline("demo", "cpu")
    with pytest.raises(
        InsufficientMemoryError, match=r"^this job needs at least \d+\.\d MB of memory, and 0\.0 MB may be"
    ):
        drawn(pipe)
    budget["room"] = 10**9
    assert np.array_equal(drawn(pipe), expected)


def test_max_memory_is_an_option(expected: Any) -> None:
    pipe = Pipeline.from_pretrained("demo", device="cpu", max_memory="8GB")
    assert np.array_equal(drawn(pipe), expected)
    assert pipe.plan.room + pipe.plan.set_aside == 8 * 10**9
    with pytest.raises(ConfigError, match="max_memory must be a size"):
        Pipeline("demo", "cpu", max_memory="lots")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_streamed_text_encoders_give_the_same_embeddings(dtype: torch.dtype) -> None:
    bundle = Bundle("demo")
    prompts = [PROMPT, ""]
    held = TextEncoders(bundle, CPU, dtype).encode(prompts, 16)
    streamed = TextEncoders(bundle, CPU, dtype, streamed=True)
    for _ in range(2):
        for a, b in zip(held, streamed.encode(prompts, 16), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    assert all(parameter.is_meta for parameter in streamed.t5.parameters())


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
    MemoryError(),
]
FAILURES = [
    ("text", TextEncoders, "encode", 0),
    ("prepare", MixtureOfExperts, "prepare", 1),
    ("buffers", Step, "__init__", 2),
    ("denoise", Step, "run", 0),
    ("denoise", Step, "run", 1),
    ("decode", Decoder, "__call__", 2),
]


@pytest.mark.parametrize(
    ("stage", "owner", "method", "kind"), FAILURES, ids=[f"{stage}-{kind}" for stage, *_, kind in FAILURES]
)
def test_running_out_of_memory_is_one_line(
    stage: str, owner: Any, method: str, kind: int, shared: Pipeline, monkeypatch: pytest.MonkeyPatch, expected: Any
) -> None:
    """Wherever memory runs out and with whatever error, the message says what would fit, and the next call works."""
    shared.prompt_cache.clear()

    def fails(*_: Any, **__: Any) -> None:
        raise OUT_OF_MEMORY[kind]

    with monkeypatch.context() as patched:
        patched.setattr(owner, method, fails)
        with pytest.raises(InsufficientMemoryError) as caught:
            drawn(shared, 80 if stage == "buffers" else 64)  # another size makes new buffers
    assert str(caught.value).startswith("the memory ran out; ")
    assert "max_memory='" in str(caught.value) or "draw fewer pixels" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(shared.engine, TorchEngine)
    assert shared.engine.weight_formats == "not loaded"
    assert np.array_equal(drawn(shared), expected)


def test_other_errors_stay_as_they_are(shared: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(Step, "run", fails)
    with pytest.raises(RuntimeError, match="something else"):
        drawn(shared)


MEASURED = """
import json, sys, threading, time
import psutil, torch
process, peak = psutil.Process(), [0]

def watch():
    while True:
        peak[0] = max(peak[0], process.memory_info().rss)
        time.sleep(0.002)

import mogle_rt
g = torch.Generator().manual_seed(0)
embeds = {"prompt_embeds": torch.randn(1, 16, 4096, generator=g), "pooled_prompt_embeds": torch.randn(1, 768, generator=g)}
threading.Thread(target=watch, daemon=True).start()
for allowed in sys.argv[2:]:
    pipe, peak[0] = mogle_rt.Pipeline(sys.argv[1], "cpu", "fp32", max_memory=allowed), 0
    for guidance in (1.0, 2.0):  # the second time, weights and slots are there while modulations are made
        options = {"num_inference_steps": 1, "seed": 0, "output_type": "latent", "guidance_scale": guidance}
        images = pipe(None, height=64, width=64, **options, **embeds).images
    planned = pipe.plan.peak + pipe.plan.set_aside
    print(json.dumps([peak[0], planned, len(pipe.plan.streamed), images.double().sum().item()]))
"""


def test_measured_memory_is_what_was_planned(tmp_path: Path) -> None:
    """A model of FLUX's width with four blocks, whose weights take 2.3 GB in float32, runs in a process of its own.

    In less memory than the weights alone would take, Python's own memory included, it draws the same image.
    """
    few = replace(FLUX_DEV, num_layers=1, num_single_layers=3)
    path = write_sparse_bundle(tmp_path / "few.safetensors", few, real_blocks=["single_transformer_blocks.1.attn.to_q"])
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": True}
    done = subprocess.run([sys.executable, "-c", MEASURED, str(path), "3GB", "9GB"], **options)
    (peak, planned, streamed, total), (_, _, none, same) = map(json.loads, done.stdout.splitlines())
    assert streamed > 2
    assert none == 0
    assert total == same
    assert peak <= 1.02 * planned <= 1.02 * 3e9
    assert planned - peak < PROCESS_BYTES  # what the plan sets aside for the process was not all needed
