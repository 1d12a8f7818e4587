"""The interface of an engine: what the pipeline passes to it and calls on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mogle_rt.encoders.mask_planes import MaskPlanes
from mogle_rt.fast.settings import FastConfig
from mogle_rt.loop.blend import Kept
from mogle_rt.loop.denoise import Denoiser
from mogle_rt.loop.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The inputs that one call of the pipeline passes to an engine.

    Attributes:
        masks: the distinct encoded pictures of B masks, and which expert sees which of them.
        prompt_embeds: [B, T, J]. pooled_prompt_embeds: [B, P].
        guidance_scale: the strength of the distilled guidance. Models without guidance ignore it.
        grid: the rows and columns of image tokens, (H / 16, W / 16).
        condition_scale, position_delta, position_scale: see `Pipeline`.
        kept: what an edit keeps of an image; None draws everything anew.
        fast: what the steps leave out; None computes everything.
    """

    masks: MaskPlanes
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    guidance_scale: float
    grid: tuple[int, int]
    condition_scale: float = 1.0
    position_delta: tuple[float, float] = (0, 0)
    position_scale: float = 1.0
    kept: Kept | None = None
    fast: FastConfig | None = None

    @classmethod
    def from_mask_latents(cls, mask_latents: Tensor, **others: Any) -> Conditions:
        """Make conditions from stacked pictures. The distinct ones are found by comparing their bits.

        Args:
            mask_latents: [B, 20, N, 64], packed VAE latents of the palette picture and the 19 region planes.
            others: all other attributes.
        """
        return cls(masks=MaskPlanes.from_stacked(mask_latents), **others)


class Engine(Denoiser, Protocol):
    """An engine: `Denoiser` for the loop, and ``prepare``, which computes what no step changes before the loop.

    ``execution`` says how steps are run, ``weight_formats`` in which formats the weights are held, and
    ``computed_steps`` how many steps were computed since `prepare`, and ``condition_steps`` how many of these computed the
    condition too.
    """

    @property
    def execution(self) -> str: ...

    @property
    def weight_formats(self) -> str: ...

    @property
    def computed_steps(self) -> int: ...

    @property
    def condition_steps(self) -> int: ...

    def prepare(self, conditions: Conditions, schedule: Schedule) -> object: ...
