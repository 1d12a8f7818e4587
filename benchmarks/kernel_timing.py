"""Times GPU kernels alone, by many calls in one CUDA graph that use more memory than the GPU's cache holds."""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from mogle_rt.kernels.workloads import Workload, workloads
from mogle_rt.ops import attention, torch_ops
from mogle_rt.ops.attention import AttentionPlan, Visibility

CACHES = 4  # how many times larger than the cache the arguments of a graph's calls are, all together


def kernel(work: Workload) -> Callable[[], object]:
    """A call of the workload's kernel."""
    return partial(work.run, **work.arguments)


def separate_operations(work: Workload) -> Callable[[], object]:
    """A call that does the same by PyTorch's own operations, as ``kernels="torch"`` does.

    It writes the same tensors, but for `region_experts` and `joint_attention`, which return theirs.
    """
    given = dict(work.arguments)
    if work.name == "joint_attention":
        plan = AttentionPlan(Visibility(given["visibility"]), given["log_scale"])
        return partial(attention.joint_attention, given["q"], given["k"], given["v"], given["condition_from"], plan)
    if work.name == "qk_norm_rope":
        given["rope"] = torch_ops.rope_buffer(torch.complex(*given["rope"].chunk(2, dim=-1)))
    if "bounds" in given:
        given["bounds"] = tuple(given["bounds"])
    order = [name for name in inspect.signature(work.run).parameters if name != "sums"]
    if work.name == "region_experts":
        order.remove("bank")
    call: Callable[[], Any] = partial(getattr(torch_ops, work.name), *(given[name] for name in order))
    return call() if "x" in given else call  # what works on a stream is prepared for its tensors first


def calls_beyond_cache(
    name: str, dtype: torch.dtype, of: Callable[[Workload], Callable[[], object]] = kernel
) -> list[Callable[[], object]]:
    """Calls of one workload, `kernel` or `separate_operations` of it, each on arguments of its own."""
    probe = next(w for w in workloads(dtype, "meta") if w.name == name)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(2, math.ceil(CACHES * cache / probe.declared().moved))

    return [of(next(w for w in workloads(dtype, "cuda") if w.name == name)) for _ in range(count)]


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
