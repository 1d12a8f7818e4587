"""How fast one processor can read what another one has just written.

Work that is spread over several processors does this all the time. In a virtual machine the speed may change while a
program runs, because the host moves virtual processors between real ones, and these may or may not share a cache.
"""

from __future__ import annotations

import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

SIZE, LINE = 1 << 19, 64  # bytes of the data, which fit a processor's own cache; and of a cache line
ROUNDS = 20


def transfer_rate() -> float | None:
    """Bytes a second from the first to the second processor that this process may use.

    None if there is only one, or if the system can't bind a thread to a processor.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    processors = sorted(os.sched_getaffinity(0))[:2]
    if len(processors) < 2:
        return None
    data = np.zeros((SIZE // LINE, LINE // 8))
    lines = np.random.default_rng(0).permutation(len(data))  # a random order, which the processor can't fetch ahead

    def write() -> None:
        np.add(data, 1, out=data)

    def read() -> float:
        begin = time.perf_counter()
        data[lines, 0]
        return time.perf_counter() - begin

    with ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as reader:
        try:
            for thread, processor in zip((writer, reader), processors, strict=True):
                thread.submit(os.sched_setaffinity, 0, {processor}).result()  # 0 means the calling thread
        except OSError:
            return None
        times = []
        for _ in range(ROUNDS):
            writer.submit(write).result()
            times.append(reader.submit(read).result())
    return SIZE / statistics.median(times)
