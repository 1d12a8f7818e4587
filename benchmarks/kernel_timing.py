"""Times GPU kernels alone, by many calls in one CUDA graph that use more memory than the GPU's cache holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import torch

from mogle_rt.kernels.workloads import Workload, workloads

CACHES = 4  # how many times larger than the cache the arguments of a graph's calls are, all together


def calls_beyond_cache(name: str, dtype: torch.dtype, run: str = "run") -> list[Callable[[], None]]:
    """Calls of one workload, each with its own arguments; with ``run="reference"`` of its PyTorch twin, not the kernel."""
    probe = next(w for w in workloads(dtype, "meta") if w.name == name)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(2, math.ceil(CACHES * cache / probe.declared().moved))

    def call() -> Callable[[], None]:
        work = _one(name, dtype)
        function: Callable[..., None] = getattr(work, run)
        return lambda: function(**work.arguments)

    return [call() for _ in range(count)]


def _one(name: str, dtype: torch.dtype) -> Workload:
    return next(w for w in workloads(dtype, "cuda") if w.name == name)


def captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One graph of all calls. Each call is run once before, because compiling can't be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def seconds(calls: Sequence[Callable[[], object]], rounds: int = 20) -> float:
    """Seconds that one call takes on the GPU, by CUDA events: the median over replays of the graph."""
    graph = captured(calls)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times) / len(calls)


def copy_rate() -> float:
    """Bytes that a copy of 1 GiB reads and writes in a second."""
    source = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds([lambda: target.copy_(source)])


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a product of two 8192 x 8192 matrices. float32 is computed without TF32."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * 8192**3 / seconds([lambda: torch.mm(a, b)], rounds=5)
