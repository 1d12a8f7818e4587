"""``python -m mogle_rt.kernels.requested`` counts what all programs of a call ask for together, and prints it as JSON.

Every program of a launch runs in Triton's interpreter with the tiles of a GPU, and each access and each product is counted
when it happens. Bytes that several programs read are counted several times, although on a GPU most of them come from its
caches. Products of `tl.dot` are counted with the padding of their tiles; other multiplications are not counted.
``TRITON_INTERPRET=1`` must be set.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextvars import ContextVar
from typing import Any, Literal, Protocol

import numpy as np
from triton import knobs
from triton.runtime.interpreter import InterpreterBuilder

from mogle_rt.kernels.common import recording
from mogle_rt.kernels.workloads import DTYPES, Workload, workloads

Access = Literal["read", "written"]
_installing = threading.Lock()


@dataclasses.dataclass
class Requested:
    """The bytes and floating point operations that all programs together asked for."""

    read: int = 0
    written: int = 0
    flops: int = 0


class Watcher(Protocol):
    """An object whose methods are called before each access and each product of an interpreted kernel."""

    def access(self, kind: Access, ptrs: Any, mask: Any) -> None:
        """Called before a load or a store, with its pointers and its mask."""

    def dot(self, a: Any, b: Any) -> None:
        """Called before a product of two matrices."""


# The watchers of this thread. Watchers of other threads are not called for its kernels.
_watchers: ContextVar[tuple[Watcher, ...]] = ContextVar("_watchers", default=())


@functools.cache
def _watch_interpreter() -> None:
    """Make the interpreter of the whole process call the watchers from now on.

    Its methods are replaced once and stay replaced. If they were put back, a thread that stops watching would also stop
    the watchers of other threads. Where there is no watcher, they do what they did before.
    """
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    dot = InterpreterBuilder.create_dot

    def masked_load(self: Any, ptrs: Any, mask: Any, *args: Any) -> Any:
        for watcher in _watchers.get():
            watcher.access("read", ptrs, mask)
        return load(self, ptrs, mask, *args)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
        for watcher in _watchers.get():
            watcher.access("written", ptrs, mask)
        return store(self, ptrs, value, mask, *args)

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        for watcher in _watchers.get():
            watcher.dot(a, b)
        return dot(self, a, b, *args)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = masked_load, masked_store
    InterpreterBuilder.create_dot = create_dot


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Call ``watcher`` for every load, store and product of the kernels that this thread interprets inside the context."""
    with _installing:
        _watch_interpreter()
    token = _watchers.set((*_watchers.get(), watcher))
    try:
        yield
    finally:
        _watchers.reset(token)


def element_bytes(ptrs: Any) -> int:
    """The size in bytes of the elements that these pointers point to."""
    return int(ptrs.get_element_ty().primitive_bitwidth) // 8


class _Counter:
    """A watcher that adds up all accesses and products."""

    def __init__(self) -> None:
        self.total = Requested()

    def access(self, kind: Access, ptrs: Any, mask: Any) -> None:
        asked = element_bytes(ptrs) * int(np.count_nonzero(np.broadcast_to(mask.data, ptrs.data.shape)))
        setattr(self.total, kind, getattr(self.total, kind) + asked)

    def dot(self, a: Any, b: Any) -> None:
        self.total.flops += 2 * math.prod(a.data.shape) * b.data.shape[-1]


@contextlib.contextmanager
def counted() -> Iterator[Requested]:
    """Count what the kernels ask for that this thread interprets inside the context."""
    counter = _Counter()
    with watched(counter):
        yield counter.total


def requested(work: Workload) -> Requested:
    """Count what the launches of a call ask for, with the tiles of a GPU.

    Raises:
        RuntimeError: kernels are not interpreted in this process.
    """
    if not knobs.runtime.interpret:
        raise RuntimeError("programs are counted in Triton's interpreter: set TRITON_INTERPRET=1")
    launches = work.launches()
    with counted() as total, np.errstate(all="ignore"):  # values may be wrong for bfloat16, counts aren't
        for launch in launches:
            launch.kernel[launch.grid](*launch.args, **launch.meta)
    return total


def _row(name: str, dtype: str) -> dict[str, Any]:
    with recording():  # so that scratch buffers also have the size that a GPU's tiles need
        work = next(work for work in workloads(DTYPES[dtype], "cpu") if work.name == name)
    return {"workload": name, "dtype": dtype, **dataclasses.asdict(requested(work))}


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m mogle_rt.kernels.requested")
    parser.add_argument("--kernel", nargs="*", required=True, metavar="CALL", help="as in python -m mogle_rt.kernels")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bf16"], help="default: bf16")
    given = parser.parse_args(arguments)
    jobs = list(itertools.product(given.kernel, given.dtype))
    context = multiprocessing.get_context("spawn")  # a forked child could inherit a lock that one of our threads holds
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        rows = list(pool.map(_row, [name for name, _ in jobs], [dtype for _, dtype in jobs]))
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
