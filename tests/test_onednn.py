"""Products by oneDNN against float64 and against PyTorch's own; and when they are taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mogle_rt import onednn
from mogle_rt.checkpoint import Bundle
from mogle_rt.lora import LoraLinear, Product
from tests.conftest import CASES, GoldenCase, assert_close
from tests.test_golden import TOLERANCE, run_steps

pytestmark = pytest.mark.skipif(not onednn.available(torch.empty(1, 1)), reason="this PyTorch has no oneDNN")


def random_layer(g: torch.Generator, inner: int, outer: int, rank: int) -> LoraLinear:
    layer = LoraLinear(inner, outer, rank)
    for name, parameter in layer.named_parameters():
        value = torch.randn(parameter.shape, generator=g) * 0.3
        setattr(layer, name, torch.nn.Parameter(value, requires_grad=False))
    return layer


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """oneDNN for every product that it takes; the list says of each whether it did GELU."""
    calls: list[bool] = []
    linear = onednn.linear

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
        calls.append(gelu)
        return linear(x, weight, bias, gelu=gelu)

    monkeypatch.setattr(onednn, "LEAST_WEIGHT", 0)
    monkeypatch.setattr(onednn, "ROWS_A_CHANNEL", 0)
    monkeypatch.setattr(onednn, "linear", noted)
    return calls


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 65, 33), (7, 33, 5), (64, 48, 192), (130, 257, 66)])
def test_linear(rows: int, inner: int, outer: int, gelu: bool, rng: torch.Generator) -> None:
    x, weight, bias = (torch.randn(*shape, generator=rng) for shape in ((rows, inner), (outer, inner), (outer,)))
    exact = F.linear(x.double(), weight.double(), bias.double())
    exact = F.gelu(exact, approximate="tanh") if gelu else exact
    assert_close(onednn.linear(x, weight, bias, gelu=gelu), exact, rms=1e-6)


@pytest.mark.parametrize("with_gelu", [False, True])
@pytest.mark.parametrize("lora_from", [0, 5, 9])
@pytest.mark.parametrize("columns", [slice(None), slice(3, 20)])
@pytest.mark.parametrize("stays", [True, False])
def test_product(
    stays: bool, columns: slice, lora_from: int, with_gelu: bool, rng: torch.Generator, always: list[bool]
) -> None:
    """The same as PyTorch's, with LoRA on a tail of the rows (9: on none), and before GELU."""
    layer, batch = random_layer(rng, 12, 24, 4), 2
    x, weight = torch.randn(9 * batch, 12, generator=rng), layer.weight[columns]
    out = torch.full((9, batch, len(weight)), float("nan"))
    scratch = torch.empty_like(out) if with_gelu else None
    result = Product(layer, out, lora_from, columns=columns, gelu_scratch=scratch, stays=stays)(x)
    exact = F.linear(x.double(), weight.double(), layer.bias[columns].double())
    low = x[lora_from * batch :].double() @ layer.lora_down.double()
    exact[lora_from * batch :] += low @ layer.lora_up[:, columns].double()
    exact = F.gelu(exact, approximate="tanh") if with_gelu else exact
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


def test_when_it_serves() -> None:
    """Large float32 products of whole weights, with enough rows."""
    assert not onednn.available(torch.empty(8, 8, device="meta"))
    assert not onednn.available(torch.empty(8, 8, dtype=torch.bfloat16))
    assert not onednn.available(torch.empty(8, 16)[:, 8:]), "gaps between rows"
    whole = torch.empty(3072, 3072)
    assert onednn.serves(whole, 2560)
    assert not onednn.serves(whole, 300), "few rows: the weight's new layout takes longer than it saves"
    assert onednn.serves(torch.empty(1024, 256), 32)
    assert not onednn.serves(torch.empty(256, 256), 544), "a small weight"
