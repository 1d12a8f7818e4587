"""The schedule and the Euler loop, as functions over an engine (REFERENCE: the loop)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from mogle_rt.errors import NumericalError
from mogle_rt.loop.progress import Progress
from mogle_rt.loop.schedule import Schedule


class Denoiser(Protocol):
    """What can run the loop: it holds the latents between steps.

    ``start`` takes latents [B, N, 64] (again after a callback has changed them) and the step they belong to;
    ``advance`` does that step and goes on to the next; ``latents`` gives them, a copy of its own.
    """

    def start(self, latents: Tensor, k: int = 0) -> None: ...

    def advance(self) -> None: ...

    def latents(self) -> Tensor: ...


OnStep = Callable[[int, Tensor], Tensor | None]  # (step, latents after it) -> latents to go on with; None: its own


def euler(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x + (σ' - σ) v in float32, in the latents' dtype again."""
    return torch.addcmul(latents.float(), velocity.float(), sigma_next - sigma).to(latents.dtype)


def denoise(
    engine: Denoiser,
    latents: Tensor,
    schedule: Schedule,
    on_step: OnStep | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
) -> Tensor:
    """Run all steps. Without ``on_step`` and ``progress`` the host only starts each step: a GPU is not waited for.

    Args:
        latents: [B, N, 64], noise.
        on_step: called after each step with a copy of the latents, which is made for it alone. The loop goes on with the
            latents that it returns, which may be this copy, edited.
        stop: called after ``on_step``; the loop ends there if it returns True.
        progress: counts each step, before ``on_step`` is called.

    Returns:
        [B, N, 64].

    Raises:
        NumericalError: the result holds NaN or infinity.
    """
    engine.start(latents)
    for k in range(len(schedule)):
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
