"""Kernels on a GPU are compared with their twins, replayed from a CUDA graph, and timed. `pytest -m gpu` runs these."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mogle_rt.kernels.common import interpreted
from mogle_rt.kernels.workloads import DTYPES, tensors, workloads
from tests.conftest import assert_close
from tests.kernels.cases import BY_NAME, Case, run_seed
from tests.kernels.test_kernels import CALLS, check
from tests.kernels.test_launchers import NAN_CASES, nan_reaches_outputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET=1 is set: kernels are interpreted, not compiled"),
]
NAMES = [w.name for w in workloads(torch.bfloat16, "meta")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case", "sizes"), CALLS)
def test_equals_its_twin_and_float64(case: Case, sizes: dict[str, Any], dtype: str) -> None:
    check(case, sizes, DTYPES[dtype], "cuda", run_seed())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_equals_its_twin_at_full_size(name: str, dtype: str) -> None:
    """Kernel and twin get equal arguments, made from the same seed."""
    mine, twin = (next(w for w in workloads(DTYPES[dtype], "cuda") if w.name == name) for _ in range(2))
    for out in BY_NAME[name].outputs:
        if out in ("out", "bank"):
            mine.arguments[out].fill_(float("nan"))
    torch.backends.cuda.matmul.allow_tf32 = False
    mine.run(**mine.arguments)
    twin.reference(**twin.arguments)
    case = BY_NAME[name]
    for out in case.outputs:
        a, b = mine.arguments[out].float(), twin.arguments[out].float()
        assert_close(a, b, rms=2 * case.bound(case.full, DTYPES[dtype], a.numel()))  # each is within it of float64


@pytest.mark.parametrize("case", NAN_CASES, ids=lambda c: c.name)
def test_nan_is_not_hidden(case: Case) -> None:
    nan_reaches_outputs(case, "cuda")


@pytest.mark.parametrize("name", NAMES)
def test_replays_from_a_graph(name: str) -> None:
    """A kernel can be captured, and a replay gives the eager result for new inputs in the same memory."""
    from benchmarks.kernel_timing import captured

    eager, work = (next(w for w in workloads(torch.bfloat16, "cuda") if w.name == name) for _ in range(2))
    graph = captured([lambda: work.run(**work.arguments)])
    captured_tensors = tensors(work.arguments)
    for argument, value in tensors(eager.arguments).items():
        if value.is_floating_point():
            value.mul_(0.5)
        captured_tensors[argument].copy_(value)
    graph.replay()
    eager.run(**eager.arguments)
    for out in BY_NAME[name].outputs:
        assert torch.equal(work.arguments[out], eager.arguments[out])


@pytest.fixture(scope="module")
def limits() -> tuple[float, float]:
    """This GPU's bytes a second of a copy, and FLOP/s of a bf16 product."""
    from benchmarks.kernel_timing import copy_rate, product_rate

    return copy_rate(), product_rate(torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_is_faster_than_separate_operations(
    name: str, limits: tuple[float, float], capsys: pytest.CaptureFixture[str]
) -> None:
    """CUDA events time the kernel and what runs with ``kernels="torch"``. Printed beside them is this GPU's least time."""
    from benchmarks.kernel_timing import calls_beyond_cache, seconds, separate_operations

    kernel = seconds(calls_beyond_cache(name, torch.bfloat16))
    separate = seconds(calls_beyond_cache(name, torch.bfloat16, separate_operations))
    cost = next(w for w in workloads(torch.bfloat16, "meta") if w.name == name).declared()
    least = max(cost.moved / limits[0], cost.flops / limits[1])
    with capsys.disabled():
        print(
            f"\n{name}: {kernel * 1e6:.1f} us, least {least * 1e6:.1f} us ({least / kernel:.0%}), "
            f"separate operations {separate * 1e6:.1f} us"
        )
    assert kernel < separate
