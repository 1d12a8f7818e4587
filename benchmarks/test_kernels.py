"""Measures the bandwidth and FLOP/s of every Triton kernel at FLUX.1-dev's sizes, beside the limits of the GPU."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from mogle_rt.kernels.workloads import DTYPES, workloads

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels are timed on CUDA devices alone")

NAMES = [w.name for w in workloads(torch.bfloat16, "meta")]


@pytest.fixture(scope="module")
def limits() -> dict[str, float]:
    """The GPU's limits: bytes a second, and FLOP/s for each dtype."""
    from benchmarks.kernel_timing import copy_rate, product_rate

    return {"copy": copy_rate()} | {name: product_rate(dtype) for name, dtype in DTYPES.items()}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_kernel(
    name: str,
    dtype: str,
    benchmark: BenchmarkFixture,
    limits: dict[str, float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A round replays a graph of so many calls that their data don't fit the cache. The time printed is of one call."""
    from benchmarks.kernel_timing import calls_beyond_cache, captured

    calls = calls_beyond_cache(name, DTYPES[dtype])
    graph = captured(calls)
    benchmark.group = f"kernels, {dtype}"
    benchmark.pedantic(graph.replay, rounds=20, iterations=1, warmup_rounds=3)  # type: ignore[no-untyped-call]
    assert benchmark.stats is not None
    seconds = benchmark.stats.stats.median / len(calls)
    cost = next(w for w in workloads(DTYPES[dtype], "meta") if w.name == name).declared()
    achieved = {
        "us": seconds * 1e6,
        "GB/s": cost.moved / seconds / 1e9,
        "of copies": cost.moved / seconds / limits["copy"],
        "TFLOP/s": cost.flops / seconds / 1e12,
        "of products": cost.flops / seconds / limits[dtype],
    }
    benchmark.extra_info.update(achieved)
    with capsys.disabled():
        print(
            f"\n{name} {dtype}: {achieved['us']:.1f} us, {achieved['GB/s']:.0f} GB/s "
            f"({achieved['of copies']:.0%} of a copy's {limits['copy'] / 1e9:.0f}), {achieved['TFLOP/s']:.1f} TFLOP/s "
            f"({achieved['of products']:.0%} of a product's {limits[dtype] / 1e12:.0f})"
        )
    assert achieved["us"] > 0
