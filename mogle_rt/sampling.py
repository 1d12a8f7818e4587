"""The schedule and the Euler loop, as functions over an engine (REFERENCE: the loop)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mogle_rt.config import SchedulerConfig
from mogle_rt.errors import InputError, NumericalError


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


class Engine(Protocol):
    """What can run the loop: it holds the latents between steps.

    ``start`` takes latents [B, N, 64] (again after a callback has changed them) and the step they belong to;
    ``advance`` does that step and goes on to the next; ``latents`` gives them, a copy of its own.
    """

    def start(self, latents: Tensor, k: int = 0) -> None: ...

    def advance(self) -> None: ...

    def latents(self) -> Tensor: ...


class VelocityLoop(ABC):
    """The loop's part of an engine that gives velocities: latents on its device, Euler's update in PyTorch."""

    _sigmas = torch.zeros(1)
    _latents = torch.zeros(1)
    _k = 0

    def follow(self, schedule: Schedule, device: torch.device) -> None:
        """Take in the schedule of the coming run."""
        self._sigmas = schedule.sigmas.to(device)

    @abstractmethod
    def step(self, latents: Tensor, k: int) -> Tensor:
        """Velocity at step k of the prepared run: [B, N, 64] -> [B, N, 64]."""

    def start(self, latents: Tensor, k: int = 0) -> None:
        """Take latents [B, N, 64] into step k."""
        self._latents, self._k = latents, k

    def advance(self) -> None:
        """One step of the loop."""
        k = self._k
        velocity = self.step(self._latents, k)
        self._latents, self._k = euler(self._latents, velocity, self._sigmas[k], self._sigmas[k + 1]), k + 1

    def latents(self) -> Tensor:
        """[B, N, 64], after the last `advance`."""
        return self._latents.clone()


OnStep = Callable[[int, Tensor], Tensor | None]  # (step, latents after it) -> latents to go on with; None: its own


def euler(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x + (σ' - σ) v in float32, in the latents' dtype again."""
    return torch.addcmul(latents.float(), velocity.float(), sigma_next - sigma).to(latents.dtype)


def denoise(
    engine: Engine,
    latents: Tensor,
    schedule: Schedule,
    on_step: OnStep | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Tensor:
    """Run all steps.

    Args:
        latents: [B, N, 64], noise.
        on_step: called after each step with a copy of the latents. What it returns goes on: also this copy, which it
            may have edited.
        stop: asked after that; True ends the loop there.

    Returns:
        [B, N, 64].

    Raises:
        NumericalError: the result holds NaN or infinity.
    """
    engine.start(latents)
    for k in range(len(schedule)):
        engine.advance()
        following = None if on_step is None else on_step(k, engine.latents())
        if following is not None:
            engine.start(following, k + 1)
        if stop():
            break
    latents = engine.latents()
    if not bool(torch.isfinite(latents).all()):
        raise NumericalError(
            "the latents became NaN or infinite: weights or inputs hold such values, or the dtype overflows"
        )
    return latents
