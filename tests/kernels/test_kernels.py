"""Every kernel against its twin and against float64: in Triton's interpreter, or on the GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mogle_rt.kernels import gate, gate_mix_embed, joint_attention, qk_norm_rope, region_experts, stream_rows
from tests.conftest import assert_close, in_the_interpreter, relative_rms
from tests.kernels.cases import BY_NAME, RMS, Case, fresh_seed, guards_kept, in_float64, small_calls
from tests.kernels.interpreter import recorded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CALLS = [
    pytest.param(case, sizes, id="-".join([case.name, *(f"{k}{v}" for k, v in sizes.items())]))
    for case, sizes in small_calls()
]


@pytest.fixture
def seed() -> int:
    return fresh_seed()


@pytest.fixture(params=["large", "as on a GPU"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has larger tiles than a GPU. Both are tested."""
    if request.param == "large":
        return
    for module in (stream_rows, qk_norm_rope, gate, gate_mix_embed, joint_attention, region_experts):
        monkeypatch.setattr(module, "interpreted", lambda: False)


def check(case: Case, sizes: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> None:
    """As exact as the twin, within the dtype's bound of float64, and nothing written but the outputs."""
    made = case.arguments(seed, dtype, device, **sizes)
    twin = case.arguments(seed, dtype, device, **sizes)
    exact = in_float64(case.arguments(seed, dtype, device, **sizes))
    before = {name: value.clone() for name, value in made.items() if isinstance(value, Tensor)}
    case.run(**made)
    case.reference(**twin)
    case.reference(**exact)
    for name, value in made.items():
        if not isinstance(value, Tensor) or name in case.scratch:
            continue
        if name not in case.outputs:
            assert torch.equal(value, before[name]), name
            continue
        assert guards_kept(value), name
        assert_close(value, exact[name], rms=RMS[dtype])
        assert_close(value, twin[name], rms=RMS[dtype])
        assert relative_rms(value, exact[name]) <= 1.5 * relative_rms(twin[name], exact[name]) + 1e-6


@in_the_interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "sizes"), CALLS)
@pytest.mark.usefixtures("tiles")
def test_equals_its_twin_and_float64(case: Case, sizes: dict[str, Any], dtype: torch.dtype, seed: int) -> None:
    check(case, sizes, dtype, "cpu", seed)


@in_the_interpreter
@pytest.mark.parametrize(("case", "sizes"), CALLS)
@pytest.mark.usefixtures("tiles")
def test_touches_its_arguments_alone_and_as_declared(case: Case, sizes: dict[str, Any], seed: int) -> None:
    """Every access of every program is within an argument, and together they are the declared bytes."""
    made = case.arguments(seed, torch.bfloat16, **sizes)
    with recorded(*case.views(made)) as traffic:
        case.run(**made)
    cost = case.cost(**made)
    assert (traffic.bytes_read, traffic.bytes_written) == (cost.read, cost.written)


@in_the_interpreter
def test_fp16_residual_is_clipped(seed: int) -> None:
    case = BY_NAME["residual"]
    made = case.arguments(seed, torch.float16, L=5, B=2, D=40, Q=2, G=1, lora_up_from=3)
    made["y"][..., :40] = 6e4
    made["gate"].fill_(100.0)
    made["clip"] = True
    case.run(**made)
    assert (made["x"] == 65504).all()
