"""``python -m mogle_rt.kernels.requested``: what the programs of a call ask for altogether, beside the least.

Every program of a launch, with the tiles of a GPU, runs in Triton's interpreter, and each access and product is counted
as it happens: bytes that several programs read count so many times (on a GPU most of them come from its caches), and
products of `tl.dot` count whole, with the padding of their tiles; what a kernel multiplies without it doesn't count.
Prints JSON; set ``TRITON_INTERPRET=1``.
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
    """Bytes and floating point operations that all programs asked for."""

    read: int = 0
    written: int = 0
    flops: int = 0


class Watcher(Protocol):
    """Who is told of what kernels do in the interpreter, each time before it is done."""

    def access(self, kind: Access, ptrs: Any, mask: Any) -> None:
        """A load or a store: its pointers and its mask."""

    def dot(self, a: Any, b: Any) -> None:
        """A product of two matrices."""


# Watchers of this thread: others are not told of its kernels.
_watchers: ContextVar[tuple[Watcher, ...]] = ContextVar("_watchers", default=())


@functools.cache
def _watch_interpreter() -> None:
    """Have the interpreter tell the watchers, from now on, for the whole process.

    Its methods are replaced once and stay replaced: were they put back, a thread that ends its watch would end that of
    another, too. Without a watcher, they do what they did before.
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
    """Within it, ``watcher`` is told of every load, store and product of kernels that this thread interprets."""
    with _installing:
        _watch_interpreter()
    token = _watchers.set((*_watchers.get(), watcher))
    try:
        yield
    finally:
        _watchers.reset(token)


def element_bytes(ptrs: Any) -> int:
    """Bytes of one element that these pointers point to."""
    return int(ptrs.get_element_ty().primitive_bitwidth) // 8


class _Counter:
    """A watcher that adds up what it is told."""

    def __init__(self) -> None:
        self.total = Requested()

    def access(self, kind: Access, ptrs: Any, mask: Any) -> None:
        asked = element_bytes(ptrs) * int(np.count_nonzero(np.broadcast_to(mask.data, ptrs.data.shape)))
        setattr(self.total, kind, getattr(self.total, kind) + asked)

    def dot(self, a: Any, b: Any) -> None:
        self.total.flops += 2 * math.prod(a.data.shape) * b.data.shape[-1]


@contextlib.contextmanager
def counted() -> Iterator[Requested]:
    """What kernels ask for that this thread interprets within it."""
    counter = _Counter()
    with watched(counter):
        yield counter.total


def requested(work: Workload) -> Requested:
    """By the launches of a call, tiles as on a GPU.

    Raises:
        RuntimeError: kernels aren't interpreted here.
    """
    if not knobs.runtime.interpret:
        raise RuntimeError("programs are counted in Triton's interpreter: set TRITON_INTERPRET=1")
    launches = work.launches()
    with counted() as total, np.errstate(all="ignore"):  # bfloat16 values are wrong in the interpreter; sizes aren't
        for launch in launches:
            launch.kernel[launch.grid](*launch.args, **launch.meta)
    return total


def _row(name: str, dtype: str) -> dict[str, Any]:
    with recording():  # scratch, too, is of the size that a GPU's tiles need
        work = next(work for work in workloads(DTYPES[dtype], "cpu") if work.name == name)
    return {"workload": name, "dtype": dtype, **dataclasses.asdict(requested(work))}


def main(arguments: list[str] | None = None) -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(prog="python -m mogle_rt.kernels.requested")
    parser.add_argument("--kernel", nargs="*", required=True, metavar="CALL", help="as in python -m mogle_rt.kernels")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bf16"], help="default: bf16")
    given = parser.parse_args(arguments)
    jobs = list(itertools.product(given.kernel, given.dtype))
    context = multiprocessing.get_context("spawn")  # a forked child would share the parent's threads' locks
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        rows = list(pool.map(_row, [name for name, _ in jobs], [dtype for _, dtype in jobs]))
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
