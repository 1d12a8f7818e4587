"""Run the loop for a pipeline, with the user's callback after each step, and check what that returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from torch import Tensor
from tqdm import tqdm

from mogle_rt.arguments import check_tensor
from mogle_rt.errors import InputError
from mogle_rt.loop.denoise import denoise
from mogle_rt.loop.progress import Progress
from mogle_rt.loop.schedule import Schedule

if TYPE_CHECKING:
    from mogle_rt.pipeline import Pipeline

StepCallback: TypeAlias = "Callable[[Pipeline, int, Tensor, dict[str, Any]], Mapping[str, Any] | None]"


def called_back(callback: StepCallback, pipe: Pipeline, k: int, timestep: Tensor, latents: Tensor) -> Tensor:
    """Call the callback and return the latents to go on with: new ones, or those it got, which it may have edited.

    Raises:
        InputError: the callback returned something other than a dict or None, or latents of another shape.
        NumericalError: the latents that it returned are not finite.
    """
    returned = callback(pipe, k, timestep, {"latents": latents})
    if returned is None:
        return latents
    if not isinstance(returned, Mapping):
        kind = type(returned).__name__
        raise InputError(f"callback_on_step_end must return a dict or None, got {kind}")
    following = returned.get("latents", latents)
    check_tensor("latents from callback_on_step_end", following, tuple(latents.shape))
    return following.to(latents)


def denoise_for(
    pipe: Pipeline, latents: Tensor, schedule: Schedule, first: int, callback: StepCallback | None, bar: tqdm[NoReturn]
) -> Tensor:
    """Run the loop from step ``first`` on. As in diffusers, the callback counts from the first step that is run.

    Raises:
        InputError, NumericalError: see `called_back` and `denoise`.
    """
    bar.unpause()  # restart the bar's clock, so that its rate counts only the steps

    def on_step(k: int, latents: Tensor) -> Tensor:
        assert callback is not None
        return called_back(callback, pipe, k - first, schedule.timesteps[k], latents)

    return denoise(
        pipe.engine,
        latents,
        schedule,
        None if callback is None else on_step,
        lambda: pipe.interrupt,
        None if bar.disable else Progress(pipe.device, bar.update),
        first,
    )
