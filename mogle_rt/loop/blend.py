"""Keep the latents of an image outside of the region that an edit draws anew, by a blend after each step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mogle_rt.loop.schedule import with_further_rows


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What the latents return to after each step where an edit keeps the image.

    Attributes:
        original: [B, N, 64], the image's packed latents, x_0.
        difference: [B, N, 64], the noise minus the original, ε - x_0. At noise level σ the original with its noise is
            x_0 + σ (ε - x_0), which is FLUX's (1 - σ) x_0 + σ ε.
        amount: [B, N, 64], 1 where the image is kept and 0 where it is drawn anew. In between, the two are mixed.
        sigmas: float32 [S], the noise level after each step.
    """

    original: Tensor
    difference: Tensor
    amount: Tensor
    sigmas: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Kept:
        """The same on another device and in another dtype; the noise levels stay float32."""
        return Kept(
            original=self.original.to(device, dtype),
            difference=self.difference.to(device, dtype),
            amount=self.amount.to(device, dtype),
            sigmas=self.sigmas.to(device),
        )

    def for_steps(self, capacity: int) -> Kept:
        """A copy in the layout of a step, [N, B, 64], with noise levels for ``capacity`` steps."""

        def token_major(x: Tensor) -> Tensor:
            return x.transpose(0, 1).clone(memory_format=torch.contiguous_format)

        return replace(
            self,
            original=token_major(self.original),
            difference=token_major(self.difference),
            amount=token_major(self.amount),
            sigmas=with_further_rows(self.sigmas, capacity),
        )


class Blend:
    """Blends the latents with those of the image after a step. All that it reads and writes has a fixed address.

    Args:
        kept: in the layout of the latents.

    Attributes:
        sigma: float32 [1], the noise level after the selected step.
        target: the image's latents at this noise level.
    """

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self.sigma = kept.sigmas[:1].clone()
        self.target = torch.empty_like(kept.original)

    @property
    def buffers(self) -> list[Tensor]:
        """What it writes to."""
        return [self.sigma, self.target]

    def select(self, index: Tensor) -> None:
        """Copy the noise level after the step whose number is in ``index``, int64 [1]."""
        torch.index_select(self.kept.sigmas, 0, index, out=self.sigma)

    def __call__(self, latents: Tensor) -> None:
        """Change latents in place. They stay exactly as they are where the amount is 0."""
        torch.addcmul(self.kept.original, self.kept.difference, self.sigma, out=self.target)
        latents.lerp_(self.target, self.kept.amount)
