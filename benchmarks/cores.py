"""How fast a processor gets what another one has just written.

Work that is spread over processors passes through this all the time. In a virtual machine it may change while a program
runs: the host moves virtual processors between real ones, which share a cache or don't.
"""

from __future__ import annotations

import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

SIZE, LINE = 1 << 19, 64  # bytes: of the data, which fit a processor's own cache, and of a cache's line
ROUNDS = 20


def transfer_rate() -> float | None:
    """Bytes a second, from the first to the second processor that this process may use.

    None where there is one only, or the system doesn't bind threads to processors.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    processors = sorted(os.sched_getaffinity(0))[:2]
    if len(processors) < 2:
        return None
    data = np.zeros((SIZE // LINE, LINE // 8))
    lines = np.random.default_rng(0).permutation(len(data))  # in an order that no prefetcher guesses

    def write() -> None:
        np.add(data, 1, out=data)

    def read() -> float:
        begin = time.perf_counter()
        data[lines, 0]
        return time.perf_counter() - begin

    with ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as reader:
        try:
            for thread, processor in zip((writer, reader), processors, strict=True):
                thread.submit(os.sched_setaffinity, 0, {processor}).result()  # 0: the thread itself, no other
        except OSError:
            return None
        times = []
        for _ in range(ROUNDS):
            writer.submit(write).result()
            times.append(reader.submit(read).result())
    return SIZE / statistics.median(times)
