"""The matrix products and attention of a call, done again with nothing between them.

What an engine on the same library calls can't be faster than: FLOPs over the rate of one large product say less, as
small products don't reach that rate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {
    aten.mm,
    aten.addmm,
    aten.addmm_,
    aten._addmm_activation,
    aten.bmm,
    aten.linear,
    aten.scaled_dot_product_attention,
    aten._scaled_dot_product_flash_attention_for_cpu,
    getattr(torch.ops.mkldnn, "_linear_pointwise", None),  # not in every PyTorch
}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in PRODUCTS:
            self.calls.append(partial(func, *args, **kwargs))
        return func(*args, **kwargs)


def recorded(call: Callable[[], object]) -> Callable[[], None]:
    """The call's products, on the tensors that they had then."""
    with _Recorder() as recorder:
        call()
    calls = recorder.calls

    @torch.inference_mode()
    def replay() -> None:
        for product in calls:
            product()

    return replay
