"""The images that a run starts from, and what of them it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mogle_rt.arguments import check_options
from mogle_rt.calls.prompts import repeated
from mogle_rt.edits.regions import latent_weights
from mogle_rt.encoders.vae import pack_latents
from mogle_rt.errors import InputError
from mogle_rt.loop.blend import Kept
from mogle_rt.loop.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class StartImage:
    """Images to start from instead of noise alone.

    Attributes:
        pixels: float32 [n, 3, H, W] in [0, 1], on the CPU; n is the number of the call's masks.
        strength: how much noise the run starts with, more than 0 and at most 1. At 1 it starts with noise alone. The
            call runs about ``strength`` of its steps, as in diffusers' image-to-image pipelines.
        weights: float32 [n, 1, H, W] in [0, 1]: how much of each pixel is drawn anew, see
            `mogle_rt.edits.regions.pixel_weights`. Where it is 0 the result has the image's own pixels. None draws all
            of them anew.

    Raises:
        InputError: the strength is out of range.
    """

    pixels: Tensor
    strength: float
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        check_options(strength=self.strength)

    @classmethod
    def joined(cls, starts: Sequence[StartImage]) -> StartImage:
        """Several in one batch. All have one strength and one size, and all have weights or none has."""
        weights = [one.weights for one in starts if one.weights is not None]
        return cls(
            pixels=torch.cat([one.pixels for one in starts]),
            strength=starts[0].strength,
            weights=torch.cat(weights) if weights else None,
        )

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is to be drawn anew."""
        return self.weights is not None and not bool(self.weights.any())

    def first_step(self, steps: int, masks: int, height: int, width: int) -> int:
        """The first step that is run of a call's ``steps``; if nothing is to be drawn anew, it is ``steps``: none.

        Raises:
            InputError: the strength leaves no step, or the images don't fit the call's number of masks or its size.
        """
        if self.pixels.shape != (masks, 3, height, width):
            raise InputError(
                f"start has images of shape {list(self.pixels.shape)}, but this call draws "
                f"{[masks, 3, height, width]}: give a mask for each image, and no other height or width"
            )
        if self.keeps_all:
            return steps
        first = int(max(steps - min(steps * self.strength, steps), 0))  # diffusers' rule, with its rounding
        if first == steps:
            raise InputError(
                f"strength {self.strength:g} of {steps} steps leaves none to run: take a strength of {1 / steps:.2g} or "
                "more, or more steps"
            )
        return first

    def begin(
        self, encode: Callable[[Tensor], Tensor], noise: Tensor, schedule: Schedule, first: int
    ) -> tuple[Tensor, Kept | None]:
        """The latents that the loop starts with, and what it keeps.

        Args:
            encode: the VAE's encoder, [n, 3, H, W] -> [n, N, 64].
            noise: [B, N, 64], where B is a multiple of n.
            schedule: of all steps. first: the step that is run first.

        Returns:
            FLUX's (1 - σ) x_0 + σ ε, [B, N, 64], and `Kept` in the noise's dtype. It is None without weights.
        """
        original = repeated(encode(self.pixels).to(noise), len(noise))
        sigma = float(schedule.sigmas[first])
        noised = ((1 - sigma) * original.float() + sigma * noise.float()).to(noise.dtype)
        if self.weights is None:
            return noised, None
        channels = noise.shape[-1] // 4
        amount = pack_latents((1 - latent_weights(self.weights)).expand(-1, channels, -1, -1).contiguous())
        kept = Kept(
            original=original,
            difference=noise - original,
            amount=repeated(amount.to(noise), len(noise)),
            sigmas=schedule.sigmas[1:].to(noise.device),
        )
        return noised, kept

    @property
    def finish(self) -> Callable[[Tensor], Tensor] | None:
        """What puts the kept pixels back into the drawn images, float32 [B, 3, H, W] in [0, 1] on the CPU.

        It is None where nothing is kept.
        """
        weights = self.weights
        if weights is None:
            return None
        return lambda drawn: torch.lerp(repeated(self.pixels, len(drawn)), drawn, repeated(weights, len(drawn)))
