"""Times the engine and the baseline in turns, after checking that they agree."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import cores, flops
from benchmarks.machine import Machine, Shape
from benchmarks.report import NOISY, Row

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
MIN_ROUNDS, MAX_ROUNDS = 3, 40
PROBE_EVERY = 2.0  # seconds between two measurements of the machine's rate


def relative_rms(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, in float64."""
    return float((a.double() - b.double()).norm() / b.double().norm())


@dataclass
class SideBySide:
    """What a benchmark calls, once. pytest-benchmark measures the engine, and the baseline runs between its rounds.

    Attributes:
        rows: the list to which results are added.
        patience: the most seconds to wait until other programs leave the processors alone.
    """

    benchmark: BenchmarkFixture
    machine: Machine
    rows: list[Row]
    patience: float = 0.0
    _product_rate: Callable[[], float] = field(default=lambda: 0.0)
    _baseline_times: list[float] = field(default_factory=list)
    _core_times: list[float] = field(default_factory=list)
    _rates: list[float] = field(default_factory=list)
    _transfers: list[float] = field(default_factory=list)

    def __call__(
        self,
        group: str,
        name: str,
        engine: Callable[[], Tensor | None],
        baseline: Callable[[], Tensor | None],
        *,
        eager: Callable[[], Tensor | None] | None = None,
        moved: int = 0,
        times: int = 1,
        before: Callable[[], object] = lambda: None,
        flops_needed: int | None = None,
        product: Shape | None = None,
        core: Callable[[], float] | None = None,
        budget: float = 4.0,
    ) -> None:
        """Check that both sides give the same result, then time them.

        Args:
            engine, baseline: the same work on either side. Their results must agree; None is not compared.
            eager: the engine's work, one operation after the other. FLOPs are counted on it; None means ``engine``.
            moved: bytes that must at least be read or written, so many ``times``.
            before: called before each of the engine's rounds, and not timed.
            flops_needed: FLOPs that the limit is computed from; None takes those that were counted.
            product: the matrix product whose rate the limit is computed from; None takes the machine's fastest.
            core: returns the seconds of the engine's products, see `benchmarks.products`; called in turns too.
            budget: seconds that all rounds should take together; there are `MIN_ROUNDS` to `MAX_ROUNDS` of them.
        """
        clock = self.machine.clock
        shape = product or self.machine.fastest_product
        self._product_rate = partial(self.machine.product_rate_now, shape, self.machine.product(shape))
        before()
        result, counted = flops.count(eager or engine)
        if eager is not None:
            before()
            result = engine()
        begin = clock()
        self._check(result, baseline())
        estimate = clock() - begin
        if estimate < budget / 10:  # fast enough to call it again, and see how long it takes when warm
            begin = clock()
            baseline()
            before()
            engine()
            estimate = clock() - begin
        else:
            estimate *= 1.7
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget / estimate)))

        gc.collect()
        wait_for_quiet(self.patience)
        gc.disable()
        try:
            with Neighbours() as neighbours:
                measure: Any = self.benchmark.pedantic  # pytest-benchmark has no types
                measure(engine, setup=lambda: self._between(baseline, before, core), rounds=rounds)
                self._probe()
        finally:
            gc.enable()
        assert self.benchmark.stats is not None
        engine_times: list[float] = self.benchmark.stats.stats.data

        needed = counted if flops_needed is None else flops_needed
        limits = {
            "products": needed / statistics.median(self._rates),
            "copies": times * self.machine.copy_seconds(moved),
        }
        bound = max(limits, key=lambda name: limits[name])
        row = Row(
            group=group,
            name=name,
            engine=1000 * statistics.median(engine_times),
            baseline=1000 * statistics.median(self._baseline_times),
            limit=1000 * limits[bound] or None,
            bound=bound,
            fastest_ratio=min(self._baseline_times) / min(engine_times),
            spread=max(_spread(engine_times), _spread(self._baseline_times)),
            others=neighbours.share,
            transfers=statistics.median(self._transfers) if self._transfers else None,
            core=1000 * statistics.median(self._core_times) if self._core_times else None,
        )
        self.record(row)
        self.benchmark.extra_info |= {
            "engine_flops": counted,
            "product_rate": statistics.median(self._rates),
            "baseline_times_ms": [1000 * t for t in self._baseline_times],
        }

    def _probe(self) -> None:
        """Measure what the machine reaches at this moment."""
        self._rates.append(self._product_rate())
        if self.machine.device.type == "cpu" and (rate := cores.transfer_rate()) is not None:
            self._transfers.append(rate)

    def _time(self, call: Callable[[], object]) -> float:
        """The seconds that a call takes."""
        begin = self.machine.clock()
        call()
        return self.machine.clock() - begin

    def record(self, row: Row) -> None:
        """Add a row to the table, and to pytest-benchmark's JSON."""
        self.rows.append(row)
        facts: dict[str, Any] = asdict(row) | {"ratio": row.ratio, "largest_ratio": row.largest_ratio}
        prefix = "" if row.unit == "ms" else f"{row.name} ".replace(" ", "_")
        self.benchmark.extra_info |= {f"{prefix}{key}": value for key, value in facts.items()}

    def _check(self, engine: Tensor | None, baseline: Tensor | None) -> None:
        if engine is None or baseline is None:
            return
        assert engine.shape == baseline.shape
        error = relative_rms(engine, baseline)
        assert error <= TOLERANCES[self.machine.dtype], f"engine and baseline differ by {error:.2g}"

    def _between(
        self, baseline: Callable[[], Any], before: Callable[[], object], core: Callable[[], float] | None
    ) -> None:
        """Called before each of the engine's rounds: make a round of the baseline, and one of the core."""
        if sum(self._baseline_times) >= len(self._rates) * PROBE_EVERY:
            self._probe()
        self._baseline_times.append(self._time(baseline))
        if core is not None:
            self._core_times.append(core())
        before()


def wait_for_quiet(patience: float) -> None:
    """Wait until other programs take less than `NOISY` of the processors' time, or ``patience`` seconds have passed."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        with Neighbours() as neighbours:
            time.sleep(1)
        if neighbours.share < NOISY:
            return


def _spread(times: list[float]) -> float:
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / 2 / middle


class Neighbours:
    """The share of the processors' time that other programs, and the host, took while the block ran."""

    def __enter__(self) -> Neighbours:
        self.share = 0.0
        self._start = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        busy, own, all_time = (b - a for a, b in zip(self._start, self._read(), strict=True))
        self.share = max(0.0, busy - own) / all_time if all_time else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds of processor time since the start: of all that was busy, of this process and those that it has started
        and that have ended, and of all there was."""
        cpu, own = psutil.cpu_times(), os.times()
        idle = cpu.idle + getattr(cpu, "iowait", 0.0)
        guest = getattr(cpu, "guest", 0.0) + getattr(cpu, "guest_nice", 0.0)  # already contained in user
        total = sum(cpu) - guest
        return total - idle, sum(own[:4]), total
