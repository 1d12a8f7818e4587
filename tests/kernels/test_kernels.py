"""Every kernel is compared with its twin and with float64, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.kernel_timing import separate_operations
from mogle_rt.kernels import gate, joint_attention, qk_norm_rope, region_experts, stream_rows
from mogle_rt.kernels.workloads import Workload, tensors
from tests.conftest import assert_close, in_the_interpreter, relative_rms
from tests.kernels.cases import BY_NAME, CASES, Case, guards_kept, in_float64, run_seed, small_calls
from tests.kernels.interpreter import recorded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CALLS = [
    pytest.param(case, sizes, id="-".join([case.name, *(f"{k}{v}" for k, v in sizes.items())]))
    for case, sizes in small_calls()
]


@pytest.fixture
def seed() -> int:
    return run_seed()


@pytest.fixture(params=["large", "as on a GPU"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles are larger in the interpreter than on a GPU, so both sizes are tested."""
    if request.param == "large":
        return
    for module in (stream_rows, qk_norm_rope, gate, joint_attention, region_experts):
        monkeypatch.setattr(module, "interpreted", lambda: False)


# Kernel and twin round at the same places, so their errors are about equal. Over at least this many values the RMS of a
# rounding error scatters by 2 % at most. There, a kernel's error may be half as large again as its twin's.
MANY = 1000


def check(case: Case, sizes: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> None:
    """Check that a kernel is within the case's bound of float64, is as exact as its twin, and writes only its outputs."""
    made, twin, exact = (case.arguments(seed, dtype, device, **sizes) for _ in range(3))
    exact = in_float64(exact)
    before = {name: value.clone() for name, value in tensors(made).items()}
    case.run(**made)
    case.reference(**twin)
    case.reference(**exact)
    for name, value in tensors(made).items():
        if name in case.scratch:
            continue
        if name not in case.outputs:
            assert torch.equal(value, before[name]), name
            continue
        assert guards_kept(value), name
        bound = case.bound(sizes, dtype, value.numel())
        assert_close(value, exact[name], rms=bound)
        assert_close(twin[name], exact[name], rms=bound)
        if dtype != torch.float32 and value.numel() >= MANY:
            own, others = relative_rms(value, exact[name]), relative_rms(twin[name], exact[name])
            assert own <= 1.5 * others + case.gain * case.summed(sizes)


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
    """Every access of every program lies within an argument, and together they touch as many bytes as are declared."""
    made = case.arguments(seed, torch.bfloat16, **sizes)
    with recorded(*case.views(made)) as traffic:
        case.run(**made)
    cost = case.cost(**made)
    assert (traffic.bytes_read, traffic.bytes_written) == (cost.read, cost.written)


@pytest.mark.quick
@in_the_interpreter
def test_fp16_residual_is_clipped(seed: int) -> None:
    case = BY_NAME["residual"]
    made = case.arguments(seed, torch.float16, L=5, B=2, D=40, Q=2, G=1, lora_up_from=3)
    made["y"][..., :40] = 6e4
    made["gate"].fill_(100.0)
    made["clip"] = True
    case.run(**made)
    assert (made["x"] == 65504).all()


@pytest.mark.quick
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_separate_operations_compute_the_same(case: Case, seed: int) -> None:
    """The operations that a kernel's time is compared with give the kernel's result."""
    sizes = case.small[0] | {"extra": 0}  # these operations need rows without gaps
    made, twin = (case.arguments(seed, torch.float32, **sizes) for _ in range(2))
    returned = separate_operations(Workload(case.name, case.run, case.reference, case.cost, made))()
    case.reference(**twin)
    for name in case.outputs:
        value = returned if isinstance(returned, torch.Tensor) else made[name]
        assert_close(value, twin[name], rms=2 * case.bound(sizes, torch.float32, value.numel()))
