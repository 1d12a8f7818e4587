"""Measures how much of a call's time is spent on matrix products and attention.

An engine that makes the same library calls can't be faster than these. Dividing the FLOPs by the rate of one large
product tells less: small products don't reach this rate, because the operation before may have left their operands in
the cache of another core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.machine import Clock

aten = torch.ops.aten
PRODUCTS = {  # and attention, as a whole or as its three operations
    aten.mm,
    aten.addmm,
    aten.addmm_,
    aten._addmm_activation,
    aten.bmm,
    aten.baddbmm,
    aten.softmax,
    aten.linear,
    aten.scaled_dot_product_attention,
    aten._scaled_dot_product_flash_attention_for_cpu,
    getattr(torch.ops.mkldnn, "_linear_pointwise", None),  # not every PyTorch has it
}


class _Stopwatch(TorchDispatchMode):
    def __init__(self, clock: Clock) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.clock, self.seconds = clock, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket not in PRODUCTS:
            return func(*args, **(kwargs or {}))
        begin = self.clock()
        result = func(*args, **(kwargs or {}))
        self.seconds += self.clock() - begin
        return result


def within(call: Callable[[], object], clock: Clock) -> Callable[[], float]:
    """A function that makes the call and returns the seconds that its products and attention took."""

    def run() -> float:
        with _Stopwatch(clock) as stopwatch:
            call()
        return stopwatch.seconds

    return run
