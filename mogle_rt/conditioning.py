"""Masks -> packed VAE latents of the 20 condition pictures (REFERENCE: mask -> condition tokens, steps 1 to 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mogle_rt.config import VAE_SCALE
from mogle_rt.masks import Labels, region_planes

MaskPosterior = Literal["mean", "sample"]
ENCODE_PIXELS = 512 * 512  # pixels encoded at once: bounds the VAE's activations, not the result


def pack_latents(z: Tensor) -> Tensor:
    """FLUX's 2x2 packing: [B, C, h, w] -> [B, h/2 * w/2, 4 C], channel slowest, then row and column of the cell."""
    B, C, h, w = z.shape
    return z.view(B, C, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, h // 2 * (w // 2), C * 4)


def unpack_latents(latents: Tensor, height: int, width: int) -> Tensor:
    """The inverse, for an image of height x width pixels: [B, N, 4 C] -> [B, C, height / 8, width / 8]."""
    B, _, C4 = latents.shape
    h, w = height // VAE_SCALE // 2, width // VAE_SCALE // 2
    cells = latents.view(B, h, w, C4 // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(B, C4 // 4, h * 2, w * 2)


class Conditioner:
    """Encodes masks with the VAE. Equal pictures (all absent classes are the same black one) are encoded once.

    Args:
        vae: diffusers' AutoencoderKL.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    def __call__(
        self,
        masks: Sequence[Labels],
        *,
        posterior: MaskPosterior = "mean",
        generators: Sequence[torch.Generator | None] | None = None,
    ) -> Tensor:
        """Encode masks.

        Args:
            masks: B label maps, uint8 [H, W] of one size.
            posterior: "mean" of the VAE's posterior, or "sample" to draw from it as the reference does.
            generators: for "sample", one for each mask.

        Returns:
            [B, 20, N, 64] in the VAE's device and dtype.
        """
        pictures = torch.stack([region_planes(labels) for labels in masks])  # uint8 [B, 20, H, W, 3]
        flat = pictures.flatten(0, 1)
        keys: dict[bytes, int] = {}
        index = [keys.setdefault(picture.numpy().tobytes(), len(keys)) for picture in flat]
        first = [index.index(i) for i in range(len(keys))]
        parameters = torch.cat([self._encode(chunk) for chunk in flat[first].split(self._chunk(masks[0]))])
        mean, logvar = parameters[index].unflatten(0, pictures.shape[:2]).chunk(2, dim=2)
        if posterior == "sample":
            deviation = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))
            seeds = generators or [None] * len(masks)
            noise = [
                randn_tensor(m.shape, generator=g, device=m.device, dtype=m.dtype)
                for m, g in zip(mean, seeds, strict=True)
            ]
            mean = mean + deviation * torch.stack(noise)
        z = (mean - self.vae.config.shift_factor) * self.vae.config.scaling_factor
        return pack_latents(z.flatten(0, 1)).unflatten(0, pictures.shape[:2])

    def _chunk(self, labels: Labels) -> int:
        return max(1, ENCODE_PIXELS // labels.size)

    def _encode(self, pictures: Tensor) -> Tensor:
        """Posterior parameters (mean, log variance) of pictures: uint8 [P, H, W, 3] -> [P, 32, H/8, W/8]."""
        # Contiguous: on channels-last input PyTorch's group norm is a hundred times less exact on flat pictures.
        x = pictures.to(self.vae.device).permute(0, 3, 1, 2).to(self.vae.dtype).contiguous() / 255
        parameters: Tensor = self.vae.encode(x * 2 - 1).latent_dist.parameters
        return parameters
