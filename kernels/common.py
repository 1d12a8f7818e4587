"""What all launchers share: the type of a declared cost, checks of arguments, and launching or recording a kernel."""

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
LARGEST_ROW = 16384  # the most channels that a program holds in registers


@dataclass(frozen=True, kw_only=True)
class KernelCost:
    """The least that a call takes.

    Attributes:
        read, written: bytes, with each address counted once.
        flops: floating point operations of the matrix products; a multiply-add counts as two.
        launches: how many kernels are launched.
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
    """A launch that was recorded instead of being run: kernel, grid of programs, arguments, constants and options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


# A context variable, so that recording in one thread does not affect launches of other threads.
_recorded: ContextVar[list[Launch] | None] = ContextVar("_recorded", default=None)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record the launches of this thread instead of running them. Tensors may be on any device, even the meta device.

    Tiles are chosen as on a GPU.

    Yields:
        The list to which every launch is appended.
    """
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def recording_now() -> bool:
    """Whether launches of this thread are recorded instead of being run."""
    return _recorded.get() is not None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch a kernel on the device of its first argument, or only record the launch inside `recording`."""
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(Launch(kernel, grid, args, meta))
        return
    with torch.cuda.device(args[0].device) if args[0].is_cuda else contextlib.nullcontext():
        kernel[grid](*args, **meta)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, as they do if ``TRITON_INTERPRET=1`` was set when Triton was imported."""
    return _recorded.get() is None and bool(knobs.runtime.interpret)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``n`` and ``least``."""
    return int(triton.next_power_of_2(max(n, least)))


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies fp32 values: as three TF32 products, which lose terms of 2^-22.

    On NVIDIA GPUs "ieee" would make kernels spill. AMD has no such products and takes "ieee".
    """
    return "ieee" if dtype == torch.float32 and torch.version.hip else "tf32x3" if dtype == torch.float32 else "tf32"


def require(condition: bool, message: str) -> None:
    """Raise ValueError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


def check(name: str, x: Tensor, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> None:
    """Check that ``x`` has this shape, the device of ``like``, its dtype (or ``dtype``), and unit stride at the end.

    Raises:
        ValueError: one of these does not hold.
    """
    dtype = like.dtype if dtype is None else dtype
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must be {list(shape)}, got {list(x.shape)}")
    if x.dtype != dtype or x.device != like.device:
        raise ValueError(f"{name} must be {dtype} on {like.device}, got {x.dtype} on {x.device}")
    if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name} must have unit stride in its last dimension, got strides {x.stride()}")


def check_rows(name: str, x: Tensor) -> int:
    """Check that rows l * B + b of [L, B, ...] lie at one common stride, and return this stride.

    Raises:
        ValueError: there is no common stride of positions and images.
    """
    L, B = x.shape[:2]
    if B == 1:
        return x.stride(0)
    if L > 1 and x.stride(0) != B * x.stride(1):
        raise ValueError(f"{name} must have stride(0) = {B} * stride(1), got strides {x.stride()}")
    return x.stride(1)


def check_device(x: Tensor) -> None:
    """Check that kernels can run on this tensor: on a GPU, or on the CPU in the interpreter, in one of `DTYPES`.

    Raises:
        ValueError: the tensor has another device or dtype.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"kernels take {', '.join(map(str, DTYPES))}, got {x.dtype}")
    if _recorded.get() is None and not x.is_cuda and not (x.device.type == "cpu" and interpreted()):
        raise ValueError(f"Triton kernels need a GPU, got a tensor on {x.device} (or set TRITON_INTERPRET=1)")


def check_bounds(bounds: Sequence[int], length: int) -> tuple[int, int]:
    """The ends of the first two groups of positions, of which there are one to three.

    Raises:
        ValueError: the ends don't ascend to ``length``.
    """
    ends = list(bounds)
    if not 1 <= len(ends) <= 3 or ends != sorted(ends) or ends[0] < 0 or ends[-1] != length:
        raise ValueError(f"bounds must be one to three ascending ends up to {length}, got {ends}")
    ends += [length] * (3 - len(ends))
    return ends[0], ends[1]


def group_rows(bounds: Sequence[int]) -> list[slice]:
    """The positions of each group, as slices."""
    return [slice(start, end) for start, end in zip([0, *bounds], bounds, strict=False)]


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of all elements of these tensors; None counts as nothing."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
