"""The noise levels of a run (REFERENCE: the schedule)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mogle_rt.config import SchedulerConfig
from mogle_rt.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a run, float32.

    Attributes:
        sigmas: [S + 1], from 1 (pure noise) down to 0.
        timesteps: [S], the scheduler's timesteps, 1000 * sigma: what the gate sees.
        model_timesteps: [S], what the transformer sees: the reference divides by 1000 and multiplies again.
    """

    sigmas: Tensor
    timesteps: Tensor
    model_timesteps: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)


LEAST_CAPACITY = 8


def step_capacity(steps: int) -> int:
    """For how many steps the tables of a run have room: 8, 16, 32, … the next that suffices.

    So another number of steps is seldom another shape, and a captured graph serves it. A step's modulations of
    FLUX.1-dev take 2.1 MB an image in 16 bits: 8 MB of unused room for 28 steps, and never more than as much again as
    the steps themselves take, from 8 steps on.
    """
    capacity = LEAST_CAPACITY
    while capacity < steps:
        capacity *= 2
    return capacity


def with_further_rows(rows: Tensor, capacity: int, filler: float = 0.0) -> Tensor:
    """The rows of a run's steps, [S, …], with further ones up to the capacity, which no step reads."""
    room = rows.new_full((capacity, *rows.shape[1:]), filler)
    room[: len(rows)] = rows
    return room


class Position:
    """Where a run stands in its schedule, counted on the host. Steps past its end are an error.

    (The device counts too, for graphs to read, but can't report anything.)

    Args:
        steps: of the schedule.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._next = 0

    def go_to(self, k: int) -> None:
        """Step k comes next, from 0; the number of steps itself stands for the end.

        Raises:
            IndexError: the schedule has no such place.
        """
        if not 0 <= k <= self._steps:
            raise IndexError(f"step must be 0 to {self._steps}, as the schedule has {self._steps} steps, got {k}")
        self._next = k

    def next_step(self) -> int:
        """The number of the step that comes next.

        Raises:
            IndexError: all are done.
        """
        if self._next >= self._steps:
            raise IndexError(
                f"all {self._steps} steps of the schedule are done: call start() to go back to one, "
                f"or prepare() for another run"
            )
        return self._next


def make_schedule(config: SchedulerConfig, num_inference_steps: int, image_tokens: int) -> Schedule:
    """FLUX's schedule: linear sigmas shifted by image size, in float64 and then rounded once.

    diffusers' own scheduler shifts (its formulas are used here); only its earlier rounding to float32 is avoided, which
    would move timesteps, and with them the gate, by a unit in the last place against the reference.

    Raises:
        InputError: fewer than one step, or an image so large that its shift overflows.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
        raise InputError(f"num_inference_steps must be a positive integer, got {num_inference_steps!r}")
    sigmas = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps)
    if config.use_dynamic_shifting:
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * (image_tokens - config.base_image_seq_len)
        try:
            sigmas = FlowMatchEulerDiscreteScheduler(time_shift_type=config.time_shift_type).time_shift(mu, 1.0, sigmas)
        except OverflowError:
            raise InputError(
                f"{image_tokens} image tokens are too many for the schedule; take a smaller size"
            ) from None
    else:
        sigmas = config.shift * sigmas / (1 + (config.shift - 1) * sigmas)
    rounded = torch.from_numpy(sigmas).to(torch.float32)
    timesteps = rounded * config.num_train_timesteps
    model_timesteps = timesteps / 1000 * 1000
    return Schedule(torch.cat([rounded, rounded.new_zeros(1)]), timesteps, model_timesteps)
