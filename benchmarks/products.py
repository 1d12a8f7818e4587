"""What a call's matrix products and attention take of its time.

What an engine on the same library calls can't be faster than: FLOPs over the rate of one large product say less, as
small products, on operands that the operation before left in the cache of another core, don't reach that rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.machine import Clock

aten = torch.ops.aten
PRODUCTS = {  # and attention, whole or by its three operations
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
    getattr(torch.ops.mkldnn, "_linear_pointwise", None),  # not in every PyTorch
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
    """A function that makes the call and says how many seconds its products and attention took."""

    def run() -> float:
        with _Stopwatch(clock) as stopwatch:
            call()
        return stopwatch.seconds

    return run
