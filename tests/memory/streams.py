"""A simulation of CUDA's streams and events on a CPU: work is queued, and done in an order that the events allow.

A real GPU shows a missing event only if its timing happens to be bad. Here the order is drawn at random, so that a wrong
order, if the events allow one, comes up after a few draws.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from mogle_rt.loop.step import Section, Step
from mogle_rt.memory import streaming
from mogle_rt.memory.streaming import CudaRing


@dataclass(eq=False)
class Event:
    """An event. It was recorded ``recorded`` times, and its stream has reached ``done`` of these records."""

    simulator: Simulator
    recorded: int = 0
    done: int = 0

    def record(self, stream: Stream) -> None:
        self.recorded += 1
        number = self.recorded

        def reached() -> None:
            self.done = number

        stream.queue.append(Work(reached))

    def synchronize(self) -> None:
        self.simulator.host_waits.append(self)
        wanted = self.recorded
        self.simulator.work_until(lambda: self.done >= wanted)


@dataclass
class Work:
    """An entry of a stream's queue, which may be done as soon as ``ready`` returns true."""

    do: Callable[[], object]
    ready: Callable[[], bool] = lambda: True


@dataclass(eq=False)
class Stream:
    """A queue of work that is done in order."""

    queue: deque[Work] = field(default_factory=deque)

    def wait_event(self, event: Event) -> None:
        wanted = event.recorded  # as in CUDA, a wait is for the records until now
        self.queue.append(Work(lambda: None, lambda: event.done >= wanted))


class Simulator:
    """Two streams, one of computations and one of copies. Their work is done in a random order that the events allow.

    Attributes:
        host_waits: the events that the host waited for.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        self.compute, self.copies, self.host_waits = Stream(), Stream(), list[Event]()
        self._random = random.Random(seed)
        self._eager = self._random.random()  # how likely work is done soon after it was queued
        run, copy = Step.run, CudaRing._copy

        def queue_section(step: Step, section: Section) -> None:
            self.compute.queue.append(Work(lambda: run(step, section)))
            self._work_a_little()

        def queue_copy(ring: CudaRing, slot: int, size: int) -> None:
            self.copies.queue.append(Work(lambda: copy(ring, slot, size)))
            self._work_a_little()

        monkeypatch.setattr(Step, "run", queue_section)
        monkeypatch.setattr(CudaRing, "_copy", queue_copy)
        monkeypatch.setattr(streaming, "pinned_bytes", lambda size: torch.empty(size, dtype=torch.uint8))
        for name, fake in {
            "Stream": lambda device: self.copies,
            "Event": lambda: Event(self),
            "current_stream": lambda device: self.compute,
            "stream": lambda stream: nullcontext(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def submit(self, fn: Any, /, *args: Any) -> Future[None]:
        """Do a task of the ring's worker at once, as a thread would that is never late."""
        future: Future[None] = Future()
        future.set_result(fn(*args))
        return future

    @torch.inference_mode()
    def work_until(self, enough: Callable[[], bool]) -> None:
        while not enough():
            assert self._do_something(), "the host waits for ever"

    def finish(self) -> None:
        """Do all queued work."""
        self.work_until(lambda: not self.compute.queue and not self.copies.queue)

    def _work_a_little(self) -> None:
        while self._random.random() < self._eager and self._do_something():
            pass

    def _do_something(self) -> bool:
        """Do the next work of a stream that need not wait. Returns False if all streams must wait."""
        able = [s for s in (self.compute, self.copies) if s.queue and s.queue[0].ready()]
        if able:
            self._random.choice(able).queue.popleft().do()
        return bool(able)
