"""The part of the loop that engines share if they only compute velocities."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mogle_rt.loop.blend import Blend, Kept
from mogle_rt.loop.denoise import euler
from mogle_rt.loop.schedule import Position, Schedule


class VelocityLoop(ABC):
    """Base of engines that only compute velocities: it holds the latents on the device and does Euler's update."""

    weight_formats = "as exported"

    _sigmas = torch.zeros(1, dtype=torch.float32, device="cpu")
    _latents = torch.zeros(1, dtype=torch.float32, device="cpu")
    _position: Position | None = None  # None until a run is prepared
    _blend: Blend | None = None  # only for edits

    def follow(self, schedule: Schedule, device: torch.device, kept: Kept | None = None) -> None:
        """Set the schedule of the next run, and what it keeps of an image."""
        self._sigmas = schedule.sigmas.to(device)
        self._position = Position(len(schedule))
        self._blend = None if kept is None else Blend(kept.to(device, kept.original.dtype))

    @abstractmethod
    def step(self, latents: Tensor, k: int) -> Tensor:
        """The velocity at step k of the prepared run: [B, N, 64] -> [B, N, 64]."""

    def start(self, latents: Tensor, k: int = 0) -> None:
        """Set the latents, [B, N, 64], and go to step k.

        Raises:
            IndexError: the schedule has no step k.
        """
        self._prepared_position().go_to(k)
        self._latents = latents

    def advance(self) -> None:
        """Run one step of the loop.

        Raises:
            IndexError: all steps of the schedule are done.
        """
        position = self._prepared_position()
        k = position.next_step()
        velocity = self.step(self._latents, k)
        self._latents = euler(self._latents, velocity, self._sigmas[k], self._sigmas[k + 1])
        if self._blend is not None:
            self._blend.select(torch.tensor([k], device=self._latents.device))
            self._blend(self._latents)
        position.go_to(k + 1)

    def latents(self) -> Tensor:
        """A copy of the latents after the last `advance`: [B, N, 64]."""
        return self._latents.clone()

    def _prepared_position(self) -> Position:
        if self._position is None:
            raise RuntimeError("prepare() must be called before a step")
        return self._position
