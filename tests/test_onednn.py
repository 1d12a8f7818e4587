"""Products by oneDNN against float64 and against PyTorch's own; and when they are taken."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mogle_rt import Pipeline, engines, onednn
from mogle_rt.checkpoint import Bundle
from mogle_rt.config import ModelConfig
from mogle_rt.engines import STEPS_TO_PACK, TorchEngine
from mogle_rt.loading import pack_transformer
from mogle_rt.lora import Linear, LoraLinear, Product
from mogle_rt.schema import transformer_tensors
from tests.conftest import CASES, GoldenCase, assert_close
from tests.test_golden import TOLERANCE, run_steps

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"), reason="this PyTorch has no oneDNN"
)


def random_layer(g: torch.Generator, inner: int, outer: int, rank: int, parts: tuple[slice, ...]) -> LoraLinear:
    layer = LoraLinear(inner, outer, rank, parts=parts)
    for name, parameter in layer.named_parameters():
        value = torch.randn(parameter.shape, generator=g) * 0.3
        setattr(layer, name, torch.nn.Parameter(value, requires_grad=False))
    return layer


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """oneDNN for every product, whatever the weight's size and the run's length; says of each whether it did GELU."""
    calls: list[bool] = []
    linear = onednn.linear

    def noted(x: Tensor, packed: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
        calls.append(gelu)
        return linear(x, packed, bias, gelu=gelu)

    monkeypatch.setattr(onednn, "LEAST_WEIGHT", 0)
    monkeypatch.setattr(engines, "STEPS_TO_PACK", 1)
    monkeypatch.setattr(onednn, "linear", noted)
    return calls


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 65, 33), (7, 33, 5), (64, 48, 192), (130, 257, 66)])
def test_linear(rows: int, inner: int, outer: int, gelu: bool, rng: torch.Generator) -> None:
    x, weight, bias = (torch.randn(*shape, generator=rng) for shape in ((rows, inner), (outer, inner), (outer,)))
    exact = F.linear(x.double(), weight.double(), bias.double())
    exact = F.gelu(exact, approximate="tanh") if gelu else exact
    assert_close(onednn.linear(x, onednn.pack(weight), bias, gelu=gelu), exact, rms=1e-6)


@pytest.mark.parametrize("with_gelu", [False, True])
@pytest.mark.parametrize("lora_from", [0, 5, 9])
@pytest.mark.parametrize("columns", [slice(None), slice(3, 20)])
@pytest.mark.parametrize("stays", [True, False])
def test_product(
    stays: bool, columns: slice, lora_from: int, with_gelu: bool, rng: torch.Generator, always: list[bool]
) -> None:
    """The same as PyTorch's, with LoRA on a tail of the rows (9: on none), and before GELU."""
    parts = (columns,) if columns == slice(None) else (slice(0, 3), columns, slice(20, 24))
    layer, batch = random_layer(rng, 12, 24, 4, parts), 2
    x, weight = torch.randn(9 * batch, 12, generator=rng), layer.weight[columns]
    out = torch.full((9, batch, len(weight)), float("nan"))
    scratch = torch.empty_like(out) if with_gelu else None
    exact = F.linear(x.double(), weight.double(), layer.bias[columns].double())
    low = x[lora_from * batch :].double() @ layer.lora_down.double()
    exact[lora_from * batch :] += low @ layer.lora_up[:, columns].double()
    exact = F.gelu(exact, approximate="tanh") if with_gelu else exact
    layer.pack(lambda: None)
    result = Product(layer, out, lora_from, columns=columns, gelu_scratch=scratch, stays=stays)(x)
    assert_close(result, exact, rms=1e-6)
    assert (result.data_ptr() == out.data_ptr()) == stays
    assert always == [with_gelu and lora_from == 9]


@pytest.mark.parametrize("name", CASES)
def test_golden_steps(name: str, golden_bundle: Callable[[str], Path], always: list[bool]) -> None:
    """All switches with every product by oneDNN, which the golden sizes are too small for by themselves."""
    case = GoldenCase.load(name)
    trace = run_steps(case, Bundle(golden_bundle(case.settings["checkpoint"])), case.model, "torch", None)
    for key in (f"noise_pred.{case.settings['steps'] - 1}", "final_latents"):
        assert_close(trace[key], case.tensors[key], rms=TOLERANCE)
    assert {True, False} == set(always)


def test_what_is_packed() -> None:
    """Float32 weights on a CPU that are large enough; a layer if all its parts are."""
    large = torch.empty(256, 256)
    assert onednn.packs(large)
    assert not onednn.packs(large[1:])
    assert not onednn.packs(large.to("meta"))
    assert not onednn.packs(large.bfloat16())
    layer = Linear(256, 512, parts=(slice(0, 256), slice(256, 512)))
    layer.weight = torch.nn.Parameter(torch.empty(512, 256), requires_grad=False)
    assert layer.packable
    layer = Linear(256, 512, parts=(slice(0, 255), slice(255, 512)))
    layer.weight = torch.nn.Parameter(torch.empty(512, 256), requires_grad=False)
    assert not layer.packable


@pytest.fixture
def engine(golden_bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> TorchEngine:
    monkeypatch.setattr(onednn, "LEAST_WEIGHT", 0)
    return TorchEngine(Bundle(golden_bundle("tiny")), torch.device("cpu"), torch.float32, ModelConfig())


def linears(engine: TorchEngine) -> list[Linear]:
    return [layer for layer in engine.transformer.modules() if isinstance(layer, Linear)]


def test_one_weight_in_memory(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights take the plain ones' place, whose pages are let go of; a second time there is nothing to do."""
    released: list[str] = []
    monkeypatch.setattr(engine.weights.bundle, "release", released.extend)
    expected = [layer.weight.shape for layer in linears(engine)]
    pack_transformer(engine.transformer, engine.weights.bundle)
    assert all(layer.weight.is_meta for layer in linears(engine))
    assert [layer.weight.shape for layer in linears(engine)] == expected
    config = engine.config
    stored = {f"transformer.{n}" for n in transformer_tensors(config)}
    used = {n for n in stored if n.endswith(".weight") and not re.search(r"norm|time_text|context_embedder", n)}
    assert set(released) == used
    released.clear()
    pack_transformer(engine.transformer, engine.weights.bundle)
    assert not released


def test_no_room(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mapped weights can leave the memory when it is short, packed ones can't."""
    needed = sum(layer.weight.nbytes for layer in linears(engine))
    for available in (needed - 1, needed):
        monkeypatch.setattr(psutil, "virtual_memory", lambda available=available: SimpleNamespace(available=available))
        pack_transformer(engine.transformer, engine.weights.bundle)
        assert linears(engine)[0].packable == (available < needed)


@pytest.mark.parametrize(("steps", "packed"), [(STEPS_TO_PACK - 1, False), (STEPS_TO_PACK, True)])
def test_few_steps(steps: int, packed: bool, golden_bundle: Callable[[str], Path], monkeypatch: Any) -> None:
    """They don't save what packing takes. Packed weights stay for whatever run comes next."""
    monkeypatch.setattr(onednn, "LEAST_WEIGHT", 0)
    pipe = Pipeline(golden_bundle("tiny"), "cpu", "fp32")
    config = pipe.bundle.config.transformer
    prompt = torch.randn(1, 5, config.joint_attention_dim, generator=torch.Generator().manual_seed(1))
    pooled = torch.ones(1, config.pooled_projection_dim)

    def draw(steps: int, pixels: int) -> Tensor:
        images = pipe(
            num_inference_steps=steps,
            height=pixels,
            width=pixels,
            generator=torch.Generator().manual_seed(0),
            prompt_embeds=prompt,
            pooled_prompt_embeds=pooled,
            output_type="latent",
        ).images
        assert isinstance(images, Tensor)
        return images

    before = draw(2, 32)
    assert isinstance(pipe.engine, TorchEngine)
    assert all(layer.packable for layer in linears(pipe.engine))
    draw(steps, 48)
    assert all(layer.packable != packed for layer in linears(pipe.engine))
    assert_close(draw(2, 32), before, rms=1e-6)
