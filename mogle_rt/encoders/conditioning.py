"""Encode masks as packed VAE latents of 20 condition pictures (REFERENCE: mask -> condition tokens, steps 1 to 3)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from torch import Tensor

from mogle_rt.config import NUM_CLASSES, NUM_EXPERTS
from mogle_rt.encoders.cache import TensorCache
from mogle_rt.encoders.group_norm import arranged
from mogle_rt.encoders.mask_planes import MaskPlanes
from mogle_rt.encoders.vae import ENCODE_PIXELS, pack_latents, pictures_at_once
from mogle_rt.masks.classes import PALETTE, Labels
from mogle_rt.masks.labels import condition_picture
from mogle_rt.torch_api.settings import settled

MaskPosterior = Literal["mean", "sample"]


class Conditioner:
    """Encodes masks with the VAE. Equal pictures are encoded only once, within a mask, within a batch and across calls.

    All absent classes have the same black picture. An edit of one region changes only the mask's own picture and the
    pictures of the classes it touches.

    Args:
        vae: diffusers' AutoencoderKL.
        cache: keeps packed latents [N, 64]; the key is the content of their picture.
    """

    def __init__(self, vae: Any, cache: TensorCache) -> None:
        self.vae = vae
        self.cache = cache

    @settled()
    def __call__(
        self,
        masks: Sequence[Labels],
        *,
        posterior: MaskPosterior = "mean",
        generators: Sequence[torch.Generator | None] | None = None,
    ) -> MaskPlanes:
        """Encode masks.

        Args:
            masks: B label maps, uint8 [H, W], all of one size.
            posterior: "mean" uses the mean of the VAE's posterior; "sample" draws from it, as the reference does.
            generators: for "sample", one random generator for each mask.

        Returns:
            The distinct encoded pictures, on the VAE's device and in its dtype. With "sample", every picture of every
            mask is drawn separately, so all 20 B are distinct.
        """
        keys = [picture_keys(labels) for labels in masks]
        wanted = {
            key: (labels, number) for labels, row in zip(masks, keys, strict=True) for number, key in enumerate(row)
        }
        if posterior == "mean":
            latents, numbers = self._means(wanted), {key: number for number, key in enumerate(wanted)}
            index = np.array([[numbers[key] for key in row] for row in keys], dtype=np.int32)
            return MaskPlanes(torch.stack([latents[key] for key in wanted]), index)
        parameters = dict(zip(wanted, self._encode(list(wanted.values())), strict=True))
        seeds = generators or [None] * len(masks)
        drawn = [
            self._draw(torch.stack([parameters[key] for key in row]), seed)
            for row, seed in zip(keys, seeds, strict=True)
        ]
        every = np.arange(len(keys) * NUM_EXPERTS, dtype=np.int32)
        return MaskPlanes(torch.cat(drawn), every.reshape(len(keys), NUM_EXPERTS))

    def for_images(
        self,
        masks: Sequence[Labels],
        images: int,
        posterior: MaskPosterior,
        generators: torch.Generator | Sequence[torch.Generator] | None,
    ) -> MaskPlanes:
        """Encode B masks for a batch in which each of them has as many neighbouring images.

        Args:
            images: of the batch, a multiple of B.
            posterior: see `__call__`.
            generators: for "sample", one for each image or one for all.
        """
        if posterior == "mean":
            return self(masks).repeated(images)
        every = [masks[i * len(masks) // images] for i in range(images)]
        seeds = list(generators) if isinstance(generators, Sequence) else [generators] * images
        return self(every, posterior=posterior, generators=seeds)

    def _means(self, wanted: dict[PictureKey, tuple[Labels, int]]) -> dict[PictureKey, Tensor]:
        """The packed latents of each picture, [N, 64], taken from the cache or encoded now."""
        found = {key: entry[0] for key in wanted if (entry := self.cache.get(key)) is not None}
        missing = [key for key in wanted if key not in found]
        if missing:
            parameters = self._encode([wanted[key] for key in missing])
            for key, latents in zip(missing, self._pack(parameters.chunk(2, dim=1)[0]), strict=True):
                found[key] = latents.clone()  # a copy, so that dropping it from the cache frees memory
                self.cache.put(key, (found[key],))
        return found

    def _draw(self, parameters: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample from the posteriors: [20, 32, h, w] -> [20, N, 64]."""
        mean, logvar = parameters.chunk(2, dim=1)
        noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return self._pack(mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise)

    def image_latents(self, pixels: Tensor) -> Tensor:
        """Encode images, [B, 3, H, W] with values in [0, 1]: the mean of the VAE's posterior, packed as [B, N, 64]."""
        at_once = self._at_once(pixels.shape[2] * pixels.shape[3])
        parameters = torch.cat([self._parameters(part) for part in pixels.split(at_once)])
        return self._pack(parameters.chunk(2, dim=1)[0])

    def _pack(self, z: Tensor) -> Tensor:
        return pack_latents((z - self.vae.config.shift_factor) * self.vae.config.scaling_factor)

    def _encode(self, pictures: Sequence[tuple[Labels, int]]) -> Tensor:
        """The posterior's mean and log variance, [P, 32, H/8, W/8], of pictures given as (labels, picture number)."""
        parts, at_once = [], self._at_once(pictures[0][0].size)
        for i in range(0, len(pictures), at_once):
            drawn = np.stack([condition_picture(labels, number) for labels, number in pictures[i : i + at_once]])
            parts.append(self._parameters(torch.from_numpy(drawn).permute(0, 3, 1, 2), largest=255))
        return torch.cat(parts)

    def _at_once(self, pixels: int) -> int:
        return pictures_at_once(self.vae.device, pixels, ENCODE_PIXELS)

    def _parameters(self, pictures: Tensor, largest: int = 1) -> Tensor:
        """The posteriors of pictures [P, 3, H, W] whose values go from 0 to ``largest``."""
        x = pictures.to(self.vae.device).to(self.vae.dtype) / largest * 2 - 1
        return self.vae.encode(arranged(x, x.shape[2] * x.shape[3])).latent_dist.parameters.contiguous()


PictureKey: TypeAlias = tuple[tuple[int, ...], int, bytes]


def picture_keys(labels: Labels) -> list[PictureKey]:
    """A key for each of a mask's 20 pictures: the whole mask's, then one per class. Equal pictures have equal keys."""
    black: PictureKey = (labels.shape, 1, b"")
    present = np.bincount(labels.reshape(-1), minlength=NUM_CLASSES) > 0
    # The picture of a mask that holds only background is all black, like the picture of an absent class.
    keys: list[PictureKey] = [(labels.shape, 0, _digest(labels)) if PALETTE[present].any() else black]
    keys += [(labels.shape, 1, _digest(np.packbits(labels == c))) if present[c] else black for c in range(NUM_CLASSES)]
    return keys


def _digest(array: NDArray[np.uint8]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).digest()
