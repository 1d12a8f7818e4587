"""PyTorch's settings while this package computes: a caller's autocast, default device and TF32 flags change no result.

Autocast and the default device belong to a thread, so they are changed for the calling thread alone. The TF32 flags
belong to the whole process: while any thread computes here they are off for every thread, and the last one to finish
puts back what it found. The default dtype belongs to the process as well, and is never changed: the code of this
package names the dtype of every tensor that it makes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

T = TypeVar("T")

DEVICE_TYPES = ("cpu", "cuda", "mps")  # those that a pipeline may compute on
CPU = torch.device("cpu")


@contextlib.contextmanager
def settled(*, allow_tf32: bool = False) -> Iterator[None]:
    """Within this context (or the function that it decorates) results depend on arguments alone.

    Autocast is off, tensors are made on the CPU unless a device is named, and float32 products and convolutions are
    computed in float32. Everything is put back at the end, also after an error. Contexts may be nested: the outermost
    one of a thread says whether TF32 is allowed.

    Args:
        allow_tf32: let NVIDIA GPUs round the operands of float32 products and convolutions to TF32 (11 significant
            bits). Where another thread computes without this permission at the same time, nobody uses TF32.
    """
    with contextlib.ExitStack() as stack:
        for kind in DEVICE_TYPES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device() != CPU:
            stack.enter_context(CPU)
        if not getattr(_thread, "inside", False):
            stack.enter_context(_precision(allow_tf32))
        yield


_thread = threading.local()
_lock = threading.Lock()
_inside = {False: 0, True: 0}  # outermost contexts that are open, by their permission to use TF32
_found: _Precision | None = None  # the flags as they were before the first of them


@contextlib.contextmanager
def _precision(allow_tf32: bool) -> Iterator[None]:
    global _found
    counted = 0  # an interrupt may come before this context is counted, and must then not be counted out
    try:
        with _lock:
            if _found is None:
                _found = _Precision.read()
            _inside[allow_tf32] += 1
            counted = 1
            _write(allowed=not _inside[False])
        _thread.inside = True
        yield
    finally:
        _thread.inside = False
        with _lock:
            _inside[allow_tf32] -= counted
            if any(_inside.values()):
                _write(allowed=not _inside[False])
            elif _found is not None:
                _found.restore()
                _found = None


# Where PyTorch keeps the precision of float32 operations. A flag that says "none" takes its parent's value.
_backends: Any = torch.backends  # its modules set their attributes where type checkers don't see it
_PRODUCTS = (_backends.cuda.matmul, _backends.mkldnn.matmul)
_CONVOLUTIONS = (_backends.cudnn.conv, _backends.cudnn.rnn, _backends.mkldnn.conv)


def _write(*, allowed: bool) -> None:
    """TF32 on or off on GPUs; full float32 on CPUs, where oneDNN could compute in bfloat16 instead."""
    assert _found is not None
    if _found.products is not None:
        torch.set_float32_matmul_precision("high" if allowed else "highest")
    if _found.cudnn is not None:
        torch.backends.cudnn.allow_tf32 = allowed
    for flag in (*_PRODUCTS, *_CONVOLUTIONS):
        on_gpu = flag not in (_backends.mkldnn.matmul, _backends.mkldnn.conv)
        flag.fp32_precision = "tf32" if allowed and on_gpu else "ieee"


@dataclass(frozen=True)
class _Precision:
    """The flags of the process.

    PyTorch has older flags (``allow_tf32``, ``set_float32_matmul_precision``) beside newer ones
    (``fp32_precision``). Writing an older flag also writes the newer ones; reading an older one raises where the two
    disagree. So the older ones are put back first.

    Attributes:
        products, cudnn: the older flags; None where one can't be read because the newer ones disagree with it.
        newer: the values of the newer flags.
    """

    products: str | None
    cudnn: bool | None
    newer: tuple[str, ...]

    @classmethod
    def read(cls) -> _Precision:
        newer = tuple(flag.fp32_precision for flag in (*_PRODUCTS, *_CONVOLUTIONS))
        return cls(
            products=_readable(torch.get_float32_matmul_precision),
            cudnn=_readable(lambda: torch.backends.cudnn.allow_tf32),
            newer=newer,
        )

    def restore(self) -> None:
        if self.products is not None:
            torch.set_float32_matmul_precision(self.products)
        if self.cudnn is not None:
            torch.backends.cudnn.allow_tf32 = self.cudnn
        flags: tuple[Any, ...] = (*_PRODUCTS, *_CONVOLUTIONS)
        for flag, value in zip(flags, self.newer, strict=True):
            flag.fp32_precision = "none"
            if flag.fp32_precision != value:  # it wasn't its parent's value, but its own
                flag.fp32_precision = value


def _readable(flag: Callable[[], T]) -> T | None:
    try:
        return flag()
    except RuntimeError:
        return None


class NoInitialValues(TorchFunctionMode):
    """Within this context the calling thread's modules are built without drawing initial values for their weights.

    (diffusers and transformers replace PyTorch's functions for the whole process instead, so that modules that another
    thread builds meanwhile are left without values.)
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
