"""Triton's interpreter with correct bfloat16, and a record of what a kernel reads and writes.

Triton 3.6 and 3.7 compute on the raw bits of bfloat16 values. After `correct_bfloat16` they compute in fp32 and round,
as GPUs do. Triton 3.6 also turns a one-element array into an index in a way that numpy 2.4 refuses, which
`correct_indices` mends. `hasten` leaves out work that the interpreter repeats for every call within a kernel.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

from mogle_rt.kernels.requested import Access, element_bytes, watched

# The interpreter's operations on floating point values; comparisons are added below.
ARITHMETIC = [
    *("fadd", "fsub", "fmul", "fdiv", "frem", "precise_divf", "fma", "dot", "clampf"),
    *("minimumf", "minnumf", "maximumf", "maxnumf", "floor", "ceil"),
    *("exp", "exp2", "log", "log2", "sqrt", "precise_sqrt", "rsqrt", "sin", "cos", "erf"),
]


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def widened(handle: Any) -> Any:
    """The fp32 values of bfloat16 bits."""
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def rounded(handle: Any) -> Any:
    """The bfloat16 bits of fp32 values, rounded to nearest even."""
    bits = np.ascontiguousarray(handle.data.astype(np.float32)).view(np.uint32)
    bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(handle.data), np.uint16(0x7FC0), bits), tl.bfloat16)


def _in_fp32(name: str, old: Callable[..., Any]) -> Callable[..., Any]:
    def new(self: Any, *args: Any, **kwargs: Any) -> Any:
        narrow = [_is_bfloat16(a) for a in args]
        if not any(narrow):
            return old(self, *args, **kwargs)
        result = old(self, *(widened(a) if n else a for a, n in zip(args, narrow, strict=True)), **kwargs)
        if name.startswith("fcmp") or (name == "dot" and not narrow[2]):  # a dot's third operand is its fp32 sum
            return result
        return rounded(result)

    return new


def correct_bfloat16() -> None:
    """Patch Triton's interpreter for the whole process. A second call does nothing."""
    builder = InterpreterBuilder
    if hasattr(builder, "mogle_rt_corrected"):
        return
    builder.mogle_rt_corrected = True
    names = ARITHMETIC + [n.removeprefix("create_") for n in dir(builder) if n.startswith("create_fcmp")]
    for name in names:
        method = f"create_{name}"
        if hasattr(builder, method):
            setattr(builder, method, _in_fp32(name, getattr(builder, method)))
    cast, fp_to_fp, total = builder.cast_impl, builder.create_fp_to_fp, ReduceOps.sum

    def cast_impl(self: Any, src: Any, to: Any) -> Any:
        source, target = src.dtype.scalar, to.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            return widened(src) if target == tl.float32 else cast(self, widened(src), to)
        if target == tl.bfloat16 and source != tl.bfloat16:
            return rounded(src if source == tl.float32 else cast(self, src, tl.float32))
        return cast(self, src, to)

    def create_fp_to_fp(self: Any, src: Any, to: Any, rounding: Any) -> Any:
        narrow = tl.bfloat16 in (src.dtype.scalar, to.scalar)
        return self.cast_impl(src, to) if narrow and rounding is None else fp_to_fp(self, src, to, rounding)

    def reduce_sum(self: Any, x: Any) -> Any:
        if not _is_bfloat16(x.handle):
            return total(self, x)
        wide = np.sum(widened(x.handle).data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(rounded(TensorHandle(wide, tl.float32)).data, x.dtype)

    correct_indices()
    hasten()
    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    ReduceOps.sum = reduce_sum


def correct_indices() -> None:
    """Let a kernel's scalar be the end of a `range`, though numpy 2.4 turns no array into an index."""
    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def hasten() -> None:
    """Find the language's functions once, and flip a tensor with numpy. The results are the same, in half of the time.

    For every call within a kernel the interpreter goes through all names of the language, to find those that it replaces.
    And it knows no reduction by exclusive or, of which `tl.flip` consists, so it would run that element by element.
    """
    places = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    found = {
        place: [name for name, member in inspect.getmembers(place) if tl.core.is_builtin(member)] for place in places
    }
    reduce = ReduceOps.apply_impl

    def patch_builtin(place: Any, builder: Any, scope: Any) -> None:
        for name in found[place]:
            member = getattr(place, name)
            if tl.core.is_builtin(member):  # those that are replaced already are not
                interpreter._patch_attr(place, name, member, builder, scope)

    def apply_impl(self: Any, inputs: Any) -> Any:
        if self.combine_fn is not tl.standard._xor_combine or self.axis is None:
            return reduce(self, inputs)
        (x,) = inputs
        combined = np.bitwise_xor.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(combined, x.dtype)

    interpreter._patch_builtin = patch_builtin
    ReduceOps.apply_impl = apply_impl


@dataclass
class Traffic:
    """The addresses of all bytes that kernels read and wrote.

    Attributes:
        read, written: for each access, an array of the elements' first addresses, and an element's size in bytes.
    """

    read: list[tuple[NDArray[np.uint64], int]] = field(default_factory=list)
    written: list[tuple[NDArray[np.uint64], int]] = field(default_factory=list)

    @staticmethod
    def _distinct(accesses: list[tuple[NDArray[np.uint64], int]]) -> int:
        sizes = {size for _, size in accesses}
        return sum(
            size * len(np.unique(np.concatenate([at for at, width in accesses if width == size]))) for size in sizes
        )

    @property
    def bytes_read(self) -> int:
        """How many different bytes were read."""
        return self._distinct(self.read)

    @property
    def bytes_written(self) -> int:
        """How many different bytes were written."""
        return self._distinct(self.written)


class OutOfBoundsError(AssertionError):
    """A kernel reaches for memory that isn't an element of its arguments."""


def _addresses(tensors: Sequence[Tensor]) -> NDArray[np.uint64]:
    """The first addresses of all elements of these views, sorted."""
    found = []
    for x in tensors:
        offsets = np.zeros((), dtype=np.int64)
        for length, stride in zip(x.shape, x.stride(), strict=True):
            offsets = offsets[..., None] + np.arange(length) * stride
        found.append((x.data_ptr() + offsets.ravel() * x.element_size()).astype(np.uint64))
    return np.unique(np.concatenate(found)) if found else np.empty(0, np.uint64)


class _Guard:
    """Notes every access, and raises at those that aren't allowed. None allows all."""

    def __init__(self, may_read: NDArray[np.uint64] | None, may_write: NDArray[np.uint64] | None) -> None:
        self.traffic = Traffic()
        self.allowed = {"read": may_read, "written": may_write}

    def access(self, kind: Access, ptrs: Any, mask: Any) -> None:
        addresses, live = np.broadcast_arrays(ptrs.data, mask.data)
        active = addresses[live].ravel().astype(np.uint64)
        allowed = self.allowed[kind]
        if allowed is not None:
            place = np.searchsorted(allowed, active).clip(max=len(allowed) - 1)
            outside = int((allowed[place] != active).sum())
            if outside:
                raise OutOfBoundsError(f"{outside} of {len(active)} elements {kind} lie outside of its arguments")
        getattr(self.traffic, kind).append((active, element_bytes(ptrs)))

    def dot(self, a: Any, b: Any) -> None:
        """Products access no memory."""


@contextlib.contextmanager
def recorded(readable: Sequence[Tensor] | None = None, writable: Sequence[Tensor] = ()) -> Iterator[Traffic]:
    """Record what kernels read and write that run in the interpreter within this block.

    Where ``readable`` is given, every access is checked before it is made. An active lane may read an element of these
    views or of the ``writable`` ones, and write an element of the ``writable`` ones. The gaps between a view's rows
    belong to no view.

    Raises:
        OutOfBoundsError: within the block, at an access that isn't allowed.
    """
    may_read = None if readable is None else _addresses([*readable, *writable])
    may_write = None if readable is None else _addresses(writable)

    guard = _Guard(may_read, may_write)
    with watched(guard):
        yield guard.traffic
