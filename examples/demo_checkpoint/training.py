"""What all trainings share: a clock of training time, a schedule, a moving average, saved states, and processes."""

from __future__ import annotations

import copy
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

M = TypeVar("M", bound=nn.Module)

# bfloat16 is twice as fast as float32 where the CPU has instructions for it, and hundreds of times slower elsewhere.
PRODUCTS = torch.bfloat16 if torch.cpu.get_capabilities().get("avx512_bf16") else torch.float32
LONGEST_STEP = 20.0  # seconds; a longer step means that the process was stopped meanwhile


class Clock:
    """Counts the seconds spent in training steps, without pauses. It is saved and restored with the state.

    Args:
        budget: seconds of training, after which it ends.
        until: a Unix time at which training ends instead, however long it was stopped.
    """

    def __init__(self, budget: float, *, until: float | None = None) -> None:
        self.budget, self.until, self.elapsed = budget, until, 0.0
        self._last = time.monotonic()

    def tick(self) -> float:
        """Called after a step. Returns which part of the training is done, from 0 to 1."""
        now = time.monotonic()
        self.elapsed += min(now - self._last, LONGEST_STEP)
        self._last = now
        left = self.budget - self.elapsed if self.until is None else self.until - time.time()
        return self.elapsed / (self.elapsed + max(0.0, left))


def learning_rate(done: float, step: int, *, warm_up: int, constant: float) -> float:
    """The learning rate's factor: rises for ``warm_up`` steps, is 1 up to ``constant`` of the budget, falls to 0.01."""
    start = min(1.0, (step + 1) / warm_up)
    if done <= constant:
        return start
    return start * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * (done - constant) / (1 - constant))))


class Average(Generic[M]):
    """The exponential moving average of a module's parameters. It forgets faster while it is young."""

    def __init__(self, module: M, decay: float) -> None:
        self.module: M = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay, self.count = decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.count += 1
        keep = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - keep)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state so that the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    torch.save(state, part)
    os.replace(part, path)


class Team:
    """Several processes of one thread each that train one model together.

    On a machine that others use too, this is far faster than threads within operations. Each process takes its part of a
    batch. The gradients are averaged. Each process then updates its share of the parameters and sends it to the others.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def all(self, done: float) -> float:
        """Give all processes the number that process 0 has."""
        if self.size == 1:
            return done
        value = torch.tensor(done, dtype=torch.float64)
        dist.broadcast(value, 0)
        return float(value)

    def share(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """The parameters that this process updates. They are dealt out in turn, the large ones first."""
        return self._shares(parameters)[self.rank]

    def _shares(self, parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
        ordered = sorted(parameters, key=lambda p: -p.numel())
        return [ordered[rank :: self.size] for rank in range(self.size)]

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Give every process the mean of all processes' gradients."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients]).div_(self.size)
        dist.all_reduce(flat)
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(part.view(g.shape))

    @torch.no_grad()
    def exchange(self, parameters: list[nn.Parameter]) -> None:
        """Called after an update: send every process's share to all others."""
        if self.size == 1:
            return
        for rank, share in enumerate(self._shares(parameters)):
            flat = torch.cat([p.reshape(-1) for p in share])
            dist.broadcast(flat, rank)
            if rank != self.rank:
                for p, part in zip(share, flat.split([p.numel() for p in share]), strict=True):
                    p.copy_(part.view(p.shape))


def _member(rank: int, size: int, meeting: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    work(Team(rank, size), *arguments)
    if size > 1:
        dist.destroy_process_group()


def in_team(size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Run ``work(team, *arguments)`` in ``size`` processes."""
    with tempfile.TemporaryDirectory() as folder:
        options = (size, f"{folder}/meeting", work, arguments)
        if size == 1:
            _member(0, *options)
        else:
            spawn(_member, options, size)
