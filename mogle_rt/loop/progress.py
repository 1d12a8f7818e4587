"""Counts the finished steps of a run without waiting for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch

POLL = 0.005  # seconds between two checks while a GPU works on the last steps


class Progress:
    """Counts the steps that a device has finished.

    On a CPU a step is finished when its call returns. On a GPU the host only queues the work and runs ahead. So an
    event is recorded after each step, and the step counts once its event has completed. The host queries the events and
    never waits inside the loop.

    Args:
        device: where the steps run.
        tick: called with the number of steps that have finished since the last call.
    """

    def __init__(self, device: torch.device, tick: Callable[[int], object]) -> None:
        self._device, self._tick = device, tick
        self._under_way: deque[torch.cuda.Event] = deque()

    def queued(self) -> None:
        """Note that another step was queued on the device."""
        if self._device.type != "cuda":
            self._tick(1)
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._under_way.append(event)
        self._look()

    def follow(self) -> None:
        """Keep counting until all steps are finished; called when the host has nothing else to do."""
        while self._under_way:
            self._look()
            if self._under_way:
                time.sleep(POLL)

    def _look(self) -> None:
        finished = 0
        while self._under_way and self._under_way[0].query():
            self._under_way.popleft()
            finished += 1
        if finished:
            self._tick(finished)
