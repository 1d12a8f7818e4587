"""Run the user's callback after a step, and check what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from mogle_rt.arguments import check_tensor
from mogle_rt.errors import InputError

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
