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
        timesteps: [S], the scheduler's timesteps, 1000 * sigma, which the gate gets.
        model_timesteps: [S], the timesteps that the transformer gets. They may differ from ``timesteps`` by rounding,
            because the reference divides them by 1000 and multiplies again.
    """

    sigmas: Tensor
    timesteps: Tensor
    model_timesteps: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)


LEAST_CAPACITY = 8


def step_capacity(steps: int) -> int:
    """The number of steps that the tables of a run have room for: the smallest of 8, 16, 32, … that is enough.

    Rounding up means that a run with another number of steps often has the same shape and reuses a captured graph. One
    step's modulations of FLUX.1-dev take 2.1 MB per image in 16 bits, so 8 MB are unused for 28 steps. From 8 steps on,
    the unused part is never larger than the used part.
    """
    capacity = LEAST_CAPACITY
    while capacity < steps:
        capacity *= 2
    return capacity


def with_further_rows(rows: Tensor, capacity: int, filler: float = 0.0) -> Tensor:
    """The rows of a run's steps, [S, …], padded to ``capacity`` rows. No step reads the padding."""
    room = rows.new_full((capacity, *rows.shape[1:]), filler)
    room[: len(rows)] = rows
    return room


class Position:
    """The position of a run in its schedule, counted on the host. Stepping past the end is an error.

    (The device counts the steps too, because graphs read the number there, but it can't raise errors.)

    Args:
        steps: the number of steps in the schedule.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._next = 0

    def go_to(self, k: int) -> None:
        """Make step k the next one. The first step is 0; k may equal the number of steps, which means the end.

        Raises:
            IndexError: k is negative or larger than the number of steps.
        """
        if not 0 <= k <= self._steps:
            raise IndexError(f"step must be 0 to {self._steps}, as the schedule has {self._steps} steps, got {k}")
        self._next = k

    def next_step(self) -> int:
        """The number of the next step.

        Raises:
            IndexError: all steps are done.
        """
        if self._next >= self._steps:
            raise IndexError(
                f"all {self._steps} steps of the schedule are done: call start() to go back to one, "
                f"or prepare() for another run"
            )
        return self._next


def make_schedule(config: SchedulerConfig, num_inference_steps: int, image_tokens: int) -> Schedule:
    """FLUX's schedule: linear sigmas, shifted according to the image size. Computed in float64 and rounded once.

    The shift uses the formulas of diffusers' scheduler. That scheduler itself rounds to float32 earlier, which would
    change timesteps, and with them the gate, by one unit in the last place compared with the reference.

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
