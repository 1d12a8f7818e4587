"""What all trainings share: a clock that stops when the process does, a schedule, a moving average, saved states."""

from __future__ import annotations

import copy
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

LONGEST_STEP = 5.0  # seconds; what is longer was a stop


class Clock:
    """Seconds of training so far: of the steps alone, stops and pauses left out, saved and restored with the state."""

    def __init__(self, budget: float, elapsed: float = 0.0) -> None:
        self.budget, self.elapsed = budget, elapsed
        self._last = time.monotonic()

    def tick(self) -> float:
        """After a step: the part of the budget that is spent, 0 to 1."""
        now = time.monotonic()
        self.elapsed += min(now - self._last, LONGEST_STEP)
        self._last = now
        return min(1.0, self.elapsed / self.budget)


def learning_rate(done: float, step: int, *, warm_up: int, constant: float) -> float:
    """Factor of the learning rate: linear over ``warm_up`` steps, 1 until ``constant`` of the budget, cosine to 0.01."""
    start = min(1.0, (step + 1) / warm_up)
    if done <= constant:
        return start
    return start * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * (done - constant) / (1 - constant))))


class Average:
    """Exponential moving average of a module's parameters; young averages forget faster."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay, self.count = decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.count += 1
        keep = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - keep)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)
