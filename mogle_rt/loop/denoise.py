"""The Euler loop, as a function over an engine (REFERENCE: the loop)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mogle_rt.encoders.vae import pack_latents
from mogle_rt.errors import NumericalError
from mogle_rt.loop.progress import Progress
from mogle_rt.loop.schedule import Schedule


class Denoiser(Protocol):
    """Something that can run the steps of the loop. It holds the latents between steps.

    ``start`` sets the latents, [B, N, 64], and the step that comes next. It is called again after a callback has
    changed the latents. ``advance`` runs one step and moves on to the next. ``latents`` returns a copy of the latents.
    """

    def start(self, latents: Tensor, k: int = 0) -> None: ...

    def advance(self) -> None: ...

    def latents(self) -> Tensor: ...


def initial_latents(
    given: Tensor | None,
    shape: tuple[int, int, int, int],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """The latents that a run starts from: those that are given, or packed noise.

    Args:
        given: packed latents [B, N, 64], or None.
        shape: of the noise before it is packed, [B, 16, h, w].
        generator: draws the noise; or a list with one for each image.
    """
    if given is not None:
        return given.to(device, dtype)
    from diffusers.utils.torch_utils import randn_tensor  # here, since `make gpu` tests the kernels without diffusers

    # The noise is always drawn in float32, so that a seed gives the same noise in every dtype.
    noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    return pack_latents(noise).to(dtype)


OnStep = Callable[[int, Tensor], Tensor | None]  # (step, latents after it) -> the latents to continue with, or None


def euler(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x + (σ' - σ) v, computed in float32 and returned in the dtype of the latents."""
    return torch.addcmul(latents.float(), velocity.float(), sigma_next - sigma).to(latents.dtype)


def denoise(
    engine: Denoiser,
    latents: Tensor,
    schedule: Schedule,
    on_step: OnStep | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
    first: int = 0,
) -> Tensor:
    """Run the steps. Without ``on_step`` and ``progress`` the host only starts each step and does not wait for the GPU.

    Args:
        latents: [B, N, 64], noise, or an image with the noise of the first step.
        on_step: called after each step with a fresh copy of the latents. The loop continues with the latents that it
            returns, which may be this copy after editing. If it returns None, the latents stay as they are.
        stop: called after ``on_step``; the loop ends early if it returns True.
        progress: counts each step before ``on_step`` is called.
        first: the step to begin with. If it is the number of steps, none is run, and the latents stay as they are.

    Returns:
        [B, N, 64].

    Raises:
        NumericalError: the result contains NaN or infinity.
    """
    engine.start(latents, first)
    for k in range(first, len(schedule)):
        engine.advance()
        if progress is not None:
            progress.queued()
        following = None if on_step is None else on_step(k, engine.latents())
        if following is not None:
            engine.start(following, k + 1)
        if stop():
            break
    if progress is not None:
        progress.follow()
    latents = engine.latents()
    if not bool(torch.isfinite(latents).all()):
        raise NumericalError(
            "the latents became NaN or infinite: weights or inputs hold such values, or the dtype overflows"
        )
    return latents
