"""How many steps of a run are finished, told without waiting for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch

POLL = 0.005  # seconds between looks at a GPU that is at work on the last steps


class Progress:
    """Counts the steps that a device has finished.

    A CPU has finished a step when the call returns. A GPU is only told what to do, and the host runs ahead of it: there
    an event is recorded behind each step, and a step counts once its event has come. The host asks for that, and never
    waits inside the loop.

    Args:
        device: of the steps.
        tick: called with the number of steps that were finished since the last call.
    """

    def __init__(self, device: torch.device, tick: Callable[[int], object]) -> None:
        self._device, self._tick = device, tick
        self._under_way: deque[torch.cuda.Event] = deque()

    def queued(self) -> None:
        """Another step was given to the device."""
        if self._device.type != "cuda":
            self._tick(1)
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._under_way.append(event)
        self._look()

    def follow(self) -> None:
        """Goes on counting until all steps are finished, when the host has nothing else to do."""
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
