"""Fake CUDA tensors on a machine without CUDA: what a step would do on a GPU, told operation by operation.

PyTorch's fake tensors carry shapes, dtypes and devices, no values. So whatever would wait for a value (`.item()`, a
branch on a tensor, a shape that depends on data) fails on them, as it fails in the capture of a CUDA graph; copies
between devices don't, and are looked for here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ATEN = torch.ops.aten
COPIES = {ATEN.to, ATEN._to_copy, ATEN.copy_, ATEN.copy}  # in inference mode `to` comes whole

@dataclass
class Trace(TorchDispatchMode):
    """Notes every operation under it; refuses those between devices.

    Attributes:
        operations: name, and shapes and dtypes of what came out.
    """

    operations: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # questions about a tensor
            return out
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        # A CPU scalar is an argument of the launch, unless a copy is what is asked for.
        copies = func.overloadpacket in COPIES
        devices = {t.device.type for t in tensors if copies or t.dim() or t.device.type != "cpu"}
        if len(devices) > 1 or (devices and devices != {"cuda"}):
            raise AssertionError(f"{func} works on {sorted(devices)}: a copy between host and device")
        made = tuple((tuple(t.shape), t.dtype) for t in tree_leaves(out) if isinstance(t, Tensor))
        self.operations.append((str(func), made))
        return out


def fake_mode() -> FakeTensorMode:
    """Fake tensors of every device. PyTorch itself makes "cuda" work under them in a build without CUDA."""
    return FakeTensorMode(allow_non_fake_inputs=False)


def trace(step: Callable[[], object]) -> list[tuple[str, tuple[Any, ...]]]:
    """The operations of a step.

    Raises:
        AssertionError: it copies between devices.
        Exception: PyTorch's own, where it would wait for the device.
    """
    with Trace() as noted:
        step()
    return noted.operations
