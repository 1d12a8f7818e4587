"""The part of the loop that engines share if they only compute velocities."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mogle_rt.engines.contract import Conditions
from mogle_rt.fast.adaptive import course_of
from mogle_rt.fast.course import Course, Kind, Way
from mogle_rt.loop.blend import Blend
from mogle_rt.loop.denoise import euler
from mogle_rt.loop.reuse import Followed
from mogle_rt.loop.schedule import Position, Schedule


class VelocityLoop(ABC):
    """Base of engines that only compute velocities: it holds the latents on the device and does Euler's update."""

    weight_formats = "as exported"

    _sigmas = torch.zeros(1, dtype=torch.float32, device="cpu")
    _latents = torch.zeros(1, dtype=torch.float32, device="cpu")
    _position: Position | None = None  # None until a run is prepared
    _blend: Blend | None = None  # only for edits
    _course = Course(None, [])
    _velocities: list[Tensor]  # of the last two computed steps, [B, N, 64]
    _followed: Followed | None = None  # only in adaptive courses

    def follow(self, schedule: Schedule, device: torch.device, conditions: Conditions | None = None) -> None:
        """Set the schedule of the next run, what it keeps of an image, and what it leaves out.

        Raises:
            ConfigError: it leaves out more than steps.
        """
        kept, fast = (None, None) if conditions is None else (conditions.kept, conditions.fast)
        if fast is not None:
            fast.check_exported()
        self._sigmas = schedule.sigmas.to(device)
        self._position = Position(len(schedule))
        batch = 1 if conditions is None else conditions.masks.batch
        self._course, self._velocities, self._followed = course_of(fast, schedule, batch), [], None
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
        if not (self._course.may_go_on(k) and torch.equal(latents, self._latents)):
            self._course.begin(k)
        self._latents = latents

    def advance(self) -> None:
        """Run one step of the loop.

        Raises:
            IndexError: all steps of the schedule are done.
        """
        position = self._prepared_position()
        k = position.next_step()
        way = self._course.way(k)
        velocity = self._chosen(k, way) if way.fresh else self._velocity(k, way)
        self._latents = euler(self._latents, velocity, self._sigmas[k], self._sigmas[k + 1])
        if self._blend is not None:
            self._blend.select(torch.tensor([k], device=self._latents.device))
            self._blend(self._latents)
        position.go_to(k + 1)
        self._course.done(k, self._followed.changes() if self._followed is not None and any(way.fresh) else ())

    def _velocity(self, k: int, way: Way) -> Tensor:
        """The velocity of step k, computed or from earlier steps: [B, N, 64]."""
        if way.kind is Kind.REUSED:
            last = self._velocities[-1]
            return last.float() + way.weight * (last.float() - self._velocities[-2].float()) if way.weight else last
        velocity = self.step(self._latents, k)
        if self._course.config is not None:
            self._velocities = [*self._velocities[-1:], velocity]
        return velocity

    def _chosen(self, k: int, way: Way) -> Tensor:
        """The velocity of step k, where each image takes its own: [B, N, 64]."""
        followed = self._followed = self._followed or Followed(self._latents, batch_dim=0)
        followed.choose(way)
        if way.kind is Kind.WHOLE:
            followed.take(self.step(self._latents, k))
        return followed.velocity()

    @property
    def computed_steps(self) -> int:
        """How many steps were computed since the run was prepared."""
        return self._course.computed

    @property
    def condition_steps(self) -> int:
        """How many of these steps computed the condition too."""
        return self._course.with_condition

    def latents(self) -> Tensor:
        """A copy of the latents after the last `advance`: [B, N, 64]."""
        return self._latents.clone()

    def _prepared_position(self) -> Position:
        if self._position is None:
            raise RuntimeError("prepare() must be called before a step")
        return self._position
