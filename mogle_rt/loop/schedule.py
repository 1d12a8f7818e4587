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
