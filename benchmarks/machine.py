"""Measures what this machine can do: the rates of plain matrix products and of copies. It also holds the clocks."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from mogle_rt.engines.onnxruntime_import import import_onnxruntime
from mogle_rt.linear import onednn

Clock = Callable[[], float]
Shape = tuple[int, int, int]  # of a product: rows, input features, output features

# The last four occur in the models that are timed: in FLUX's width at 512 px, and in width 256 at 256 px.
PRODUCTS: tuple[Shape, ...] = (
    (2048, 2048, 2048),
    (4096, 4096, 4096),
    (2560, 3072, 9216),
    (2560, 15360, 3072),
    (544, 256, 1792),
    (544, 1280, 256),
)
COPIES = tuple(2**power for power in (20, 24, 26, 28, 30))  # bytes


def keep_freed_memory() -> bool:
    """Tell C's allocator to keep memory that is freed, for both sides alike.

    By itself the allocator sometimes returns memory to the system and asks for it again. Whether it does depends on
    where small tensors happen to lie, and a call that makes large tensors then takes up to a fifth longer.

    Returns:
        Whether it will. This is known for glibc's allocator only.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(mmap_threshold, 32 << 20) and libc.mallopt(trim_threshold, (1 << 31) - 1))


class CudaClock:
    """Seconds of the GPU's own time, by CUDA events. Reading the clock waits for all work that was launched."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._last = self._event()

    def __call__(self) -> float:
        now = self._event()
        self._seconds += self._last.elapsed_time(now) / 1000  # float32: exact for short spans only
        self._last = now
        return self._seconds

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return event


class Machine:
    """A device and its limits.

    Attributes:
        keeps_memory: see `keep_freed_memory`.
        products: FLOP/s of matrix products, the best of a few runs.
        copies: bytes read and written a second by a copy's size, the best of a few.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.keeps_memory = keep_freed_memory()
        self.clock: Clock = CudaClock() if device.type == "cuda" else time.perf_counter
        self._repeats = 1 if device.type == "cpu" else 20  # a GPU's launches overlap
        self.products = {shape: _flops(shape) / self._best(self.product(shape)) for shape in PRODUCTS}
        self.copies = {size: self._copy_rate(size) for size in COPIES}

    def product(self, shape: Shape) -> Callable[[], Tensor]:
        """A call that multiplies random matrices of this shape as a linear layer does, by the faster of two libraries."""
        rows, inner, outer = shape
        x = torch.randn((rows, inner), device=self.device, dtype=self.dtype)
        weight = torch.randn((outer, inner), device=self.device, dtype=self.dtype)
        calls: list[Callable[[], Tensor]] = [lambda: linear(x, weight)]
        if onednn.packs(weight.shape, weight.device, weight.dtype):
            packed = onednn.pack(weight)
            calls.append(lambda: onednn.linear(x, packed))
        return min(calls, key=self._best)

    def _best(self, run: Callable[[], object], at_least: float = 0.3) -> float:
        """Seconds of the fastest run. There are three runs or more, and they take ``at_least`` seconds together."""
        run()
        best, done, start = float("inf"), 0, time.perf_counter()
        while done < 3 or time.perf_counter() - start < at_least:
            begin = self.clock()
            for _ in range(self._repeats):
                run()
            best, done = min(best, (self.clock() - begin) / self._repeats), done + 1
        return best

    def _copy_rate(self, size: int) -> float:
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.zeros_like(source)
        return 2 * size / self._best(lambda: target.copy_(source), 0.1)

    @property
    def fastest_product(self) -> Shape:
        """The shape with the highest rate."""
        return max(self.products, key=lambda shape: self.products[shape])

    @property
    def copy_rate(self) -> float:
        """Bytes a second of the largest copy."""
        return self.copies[COPIES[-1]]

    def product_rate_now(self, shape: Shape, product: Callable[[], Tensor]) -> float:
        """FLOP/s that the machine reaches at this moment with `product`: the median of a few runs."""
        rates: list[float] = []
        start = time.perf_counter()
        while not rates or time.perf_counter() - start < 0.05:
            begin = self.clock()
            for _ in range(self._repeats):
                product()
            rates.append(_flops(shape) * self._repeats / (self.clock() - begin))
        return statistics.median(rates)

    def copy_seconds(self, moved: int) -> float:
        """The least seconds in which ``moved`` bytes can be read or written. Small amounts may lie in a cache."""
        rates = [rate for size, rate in self.copies.items() if 2 * size >= moved]
        return moved / max(rates or [self.copy_rate])

    def describe(self) -> dict[str, str]:
        """The hardware, the versions and the date, as a report shows them."""
        facts = {"date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")}
        if self.device.type == "cuda":
            facts["GPU"] = torch.cuda.get_device_name(self.device)
        facts["CPU"] = f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"
        facts["system"] = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
        versions = {name: version(name) for name in ("mogle-rt", "torch", "diffusers", "peft")}
        versions["onnxruntime"] = import_onnxruntime().__version__  # several packages have this module
        facts["versions"] = ", ".join(f"{name} {number}" for name, number in versions.items())
        facts["computed in"] = str(self.dtype).removeprefix("torch.")
        facts["matrix products"] = ", ".join(
            f"{rate / 1e9:.0f} GFLOP/s at {' x '.join(map(str, shape))}" for shape, rate in self.products.items()
        )
        facts["memory"] = "freed blocks up to 32 MiB are kept" if self.keeps_memory else "kept as the allocator decides"
        size = max(self.copies, key=lambda size: self.copies[size])
        facts["copies"] = (
            f"{self.copy_rate / 1e9:.1f} GB/s read and written ({self.copies[size] / 1e9:.1f} at {size >> 20} MiB)"
        )
        return facts


def _flops(shape: Shape) -> float:
    return 2.0 * math.prod(shape)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
