"""A caller's settings of PyTorch change no result, and are as they were afterwards."""

from __future__ import annotations

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
from mogle_rt.torch_api import settings
from mogle_rt.torch_api.settings import settled
from tests.torch_api.precision_flags import flags

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
    """Draw an image with whatever settings the caller has."""
    labels = np.zeros((SIZE, SIZE), np.uint8)
    labels[16:48, 8:40], labels[20:30, 20:30] = 1, 13
    generator = torch.Generator("cpu").manual_seed(3)
    settings: dict[str, Any] = {"num_inference_steps": 2, "height": SIZE, "width": SIZE, "output_type": "pt"}
    images = pipe(labels, prompt, generator=generator, **settings | options).images
    assert isinstance(images, Tensor)
    return images


@pytest.fixture(scope="module")
def expected(tiny_bundle: Path) -> dict[str, Tensor]:
    """Images by prompt, drawn by a new pipeline with PyTorch's default settings."""
    pipe = Pipeline(tiny_bundle, device="cpu", dtype="fp32")
    return {prompt: draw(pipe, prompt) for prompt in ("a woman", "an old man")}


@pytest.fixture(scope="module")
def drawn_with(tiny_bundle: Path) -> Callable[[dict[str, Any]], Tensor]:
    """A function that draws the image of some options with PyTorch's default settings, once for each set of options."""
    drawn: dict[str, Tensor] = {}

    def image(options: dict[str, Any]) -> Tensor:
        if str(options) not in drawn:
            drawn[str(options)] = draw(Pipeline(tiny_bundle, device="cpu", dtype="fp32"), **options)
        return drawn[str(options)]

    return image


@pytest.mark.parametrize("name", OUTER)
def test_outer_settings_change_nothing(name: str, tiny_bundle: Path, expected: dict[str, Tensor]) -> None:
    """A pipeline is made and called within these settings; what it has cached then serves a call outside of them."""
    with OUTER[name]():
        pipe = Pipeline(tiny_bundle, device="cpu", dtype="fp32")
        within = draw(pipe)
    assert within.dtype == torch.float32
    assert torch.equal(within, expected["a woman"])
    hits = pipe.conditioning_cache.hits
    assert torch.equal(draw(pipe), expected["a woman"])
    assert pipe.conditioning_cache.hits > hits  # the cached planes were made within the settings
    assert torch.equal(draw(pipe, "an old man"), expected["an old man"])
    with OUTER[name]():
        assert torch.equal(draw(pipe, "an old man"), expected["an old man"])


@pytest.mark.parametrize("name", OUTER)
@pytest.mark.parametrize(
    "options", [{"condition_scale": 2.0}, {"mask_posterior": "sample"}, {"position_scale": 2.0}], ids=str
)
def test_outer_settings_change_nothing_with_options(
    name: str, options: dict[str, Any], tiny_bundle: Path, drawn_with: Callable[[dict[str, Any]], Tensor]
) -> None:
    expected = drawn_with(options)
    with OUTER[name]():
        assert torch.equal(draw(Pipeline(tiny_bundle, device="cpu", dtype="fp32"), **options), expected)


def test_importing_within_outer_settings(tiny_bundle: Path, expected: dict[str, Tensor]) -> None:
    """Some modules hold tensors, which must not depend on the settings in which the package is imported."""
    code = f"""
import torch
torch.set_default_device("meta")
torch.set_default_dtype(torch.float16)
from mogle_rt.start.quick_imports import import_models
import_models()
from tests.torch_api.test_settings import draw
from mogle_rt import Pipeline
images = draw(Pipeline({str(tiny_bundle)!r}, device="cpu", dtype="fp32"))
print(images.numpy().tobytes().hex())
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == expected["a woman"].numpy().tobytes().hex()


# Statements that people write to set precision. One new process runs them one after the other.
STATEMENTS = [
    "pass",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.cudnn.allow_tf32 = False",
    "torch.backends.cudnn.conv.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cudnn.fp32_precision = 'ieee'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
]


def test_precision_is_float32_within_and_the_callers_afterwards() -> None:
    """Whichever of PyTorch's two sets of flags was used before, or both."""
    code = "import torch\nfrom tests.torch_api.precision_flags import check_flags\n"
    code += "\n".join(f"{statement}\ncheck_flags()" for statement in STATEMENTS)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.quick
def test_one_thread_that_wants_float32_has_it() -> None:
    """The flags are the whole process's: while one thread computes without TF32, no other thread uses it either."""
    before, allowed_in, strict_in, read, strict_out = flags(), *(threading.Event() for _ in range(4))
    seen = {}

    def allowing() -> None:
        with settled(allow_tf32=True):
            seen["alone"] = flags()["cuda.matmul"]
            allowed_in.set()
            strict_in.wait(10)
            seen["together"] = flags()["cuda.matmul"]
            read.set()
            strict_out.wait(10)
            seen["alone again"] = flags()["cuda.matmul"]

    thread = threading.Thread(target=allowing)
    thread.start()
    allowed_in.wait(10)
    with settled():
        strict_in.set()
        read.wait(10)
        assert flags()["cuda.matmul"] == "ieee"
    strict_out.set()
    thread.join(10)
    assert seen == {"alone": "tf32", "together": "ieee", "alone again": "tf32"}
    assert flags() == before


@pytest.mark.quick
def test_an_interrupt_at_the_start_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A context that is interrupted while it is entered isn't counted as left: the next one may still use TF32."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    before = flags()
    with monkeypatch.context() as patched:
        patched.setattr(settings._Precision, "read", interrupt)
        with pytest.raises(KeyboardInterrupt), settled():
            pass
    with settled(allow_tf32=True):
        assert flags()["cuda.matmul"] == "tf32"
    assert flags() == before


@pytest.mark.quick
def test_a_pipeline_asks_for_tf32(tiny_bundle: Path) -> None:
    for allowed, expected in ((False, "ieee"), (True, "tf32")):
        seen: list[str] = []
        pipe = Pipeline(tiny_bundle, device="cpu", dtype="fp32", allow_tf32=allowed)
        draw(pipe, callback_on_step_end=lambda *_, seen=seen: seen.append(flags()["cuda.matmul"]))
        assert seen == [expected] * 2


@pytest.mark.quick
def test_other_threads_keep_their_autocast() -> None:
    entered, checked = threading.Event(), threading.Event()

    def other() -> None:
        with settled():
            entered.set()
            checked.wait(10)

    thread = threading.Thread(target=other)
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        thread.start()
        entered.wait(10)
        assert torch.is_autocast_enabled("cpu")
        assert torch.empty(1).is_meta
        with settled():
            assert not torch.is_autocast_enabled("cpu")
            assert torch.empty(1).device.type == "cpu"
        assert torch.is_autocast_enabled("cpu")
        assert torch.empty(1).is_meta
    checked.set()
    thread.join(10)
