"""What the launchers share: declared cost, checks of their arguments, and where a launch goes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_ROW = 16384  # channels that a program holds in registers


@dataclass(frozen=True, kw_only=True)
class KernelCost:
    """What a launch takes at least.

    Attributes:
        read, written: bytes, each address once.
        flops: floating point operations of its matrix products; a multiply-add is two.
        launches: kernels.
    """

    read: int
    written: int
    flops: int
    launches: int = 1

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded in place of being done: kernel, programs, arguments, constants and options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


# A context variable, so that a thread that records leaves the launches of all other threads alone.
_recorded: ContextVar[list[Launch] | None] = ContextVar("_recorded", default=None)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within it, launchers of this thread take tensors of any device (even meta) and tiles as on a GPU; nothing runs.

    Yields:
        The list to which each launch is added.
    """
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch on the device of the first argument, or note it down for `recording`."""
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(Launch(kernel, grid, args, meta))
        return
    with torch.cuda.device(args[0].device) if args[0].is_cuda else contextlib.nullcontext():
        kernel[grid](*args, **meta)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` when triton was imported)."""
    return _recorded.get() is None and bool(knobs.runtime.interpret)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``n`` and ``least``."""
    return int(triton.next_power_of_2(max(n, least)))


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies fp32 values: as three TF32 products, less terms of 2^-22; on NVIDIA "ieee" would spill."""
    return "ieee" if dtype == torch.float32 and torch.version.hip else "tf32x3" if dtype == torch.float32 else "tf32"


def require(condition: bool, message: str) -> None:
    """Raises ValueError with ``message`` where ``condition`` doesn't hold."""
    if not condition:
        raise ValueError(message)


def check(name: str, x: Tensor, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> None:
    """``x`` has this shape, the device and dtype of ``like`` (or ``dtype``), and unit stride in its last dimension.

    Raises:
        ValueError: it hasn't.
    """
    dtype = like.dtype if dtype is None else dtype
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must be {list(shape)}, got {list(x.shape)}")
    if x.dtype != dtype or x.device != like.device:
        raise ValueError(f"{name} must be {dtype} on {like.device}, got {x.dtype} on {x.device}")
    if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name} must have unit stride in its last dimension, got strides {x.stride()}")


def check_rows(name: str, x: Tensor) -> int:
    """[L, B, ...] is one run of rows l * B + b; returns the stride of a row.

    Raises:
        ValueError: positions and images don't lie at one stride.
    """
    L, B = x.shape[:2]
    if B == 1:
        return x.stride(0)
    if L > 1 and x.stride(0) != B * x.stride(1):
        raise ValueError(f"{name} must have stride(0) = {B} * stride(1), got strides {x.stride()}")
    return x.stride(1)


def check_device(x: Tensor) -> None:
    """Kernels run on GPUs, and on the CPU in the interpreter, in the dtypes they know.

    Raises:
        ValueError: this tensor's device or dtype isn't one of those.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"kernels take {', '.join(map(str, DTYPES))}, got {x.dtype}")
    if _recorded.get() is None and not x.is_cuda and not (x.device.type == "cpu" and interpreted()):
        raise ValueError(f"Triton kernels need a GPU, got a tensor on {x.device} (or set TRITON_INTERPRET=1)")


def check_bounds(bounds: Sequence[int], length: int) -> tuple[int, int]:
    """Ends of the first two of at most three row groups.

    Raises:
        ValueError: the ends don't ascend to ``length``.
    """
    ends = list(bounds)
    if not 1 <= len(ends) <= 3 or ends != sorted(ends) or ends[0] < 0 or ends[-1] != length:
        raise ValueError(f"bounds must be one to three ascending ends up to {length}, got {ends}")
    ends += [length] * (3 - len(ends))
    return ends[0], ends[1]


def group_rows(bounds: Sequence[int]) -> list[slice]:
    """Positions of each group."""
    return [slice(start, end) for start, end in zip([0, *bounds], bounds, strict=False)]


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of tensors' elements."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
