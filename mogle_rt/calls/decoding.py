"""Decode packed latents to images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from mogle_rt.arguments import check_tensor
from mogle_rt.calls.memory import tells_of_memory
from mogle_rt.calls.results import OutputType
from mogle_rt.calls.turns import TakesTurns, one_at_a_time
from mogle_rt.config import PATCH, VAE_SCALE
from mogle_rt.encoders.group_norm import arranged
from mogle_rt.encoders.vae import DECODE_PIXELS, pictures_at_once, unpack_latents
from mogle_rt.errors import InputError, NumericalError


class Decoder:
    """The VAE's decoder and diffusers' conversion to images.

    Args:
        vae: diffusers' AutoencoderKL.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.image_processor = VaeImageProcessor(vae_scale_factor=VAE_SCALE * 2)

    def __call__(
        self,
        packed: Tensor,
        height: int,
        width: int,
        output_type: OutputType,
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> Any:
        """Decode packed latents [B, N, 64] of images of height x width pixels.

        Args:
            finish: changes the images, float32 [B, 3, H, W] in [0, 1] on the CPU, before they are converted.

        Returns:
            The images in the form that `PipelineOutput` describes for this ``output_type``.

        Raises:
            NumericalError: the image holds NaN or infinity.
        """
        packed = packed.to(self.vae.dtype)
        z = unpack_latents(packed, height, width) / self.vae.config.scaling_factor + self.vae.config.shift_factor
        z = arranged(z, height * width)
        at_once = pictures_at_once(packed.device, height * width, DECODE_PIXELS)
        image = torch.cat([self.vae.decode(part).sample.contiguous() for part in z.split(at_once)])
        if not bool(torch.isfinite(image).all()):
            raise NumericalError(
                f"the decoded image holds NaN or infinity: the VAE doesn't decode it in {self.vae.dtype}"
            )
        if finish is None:
            return self.image_processor.postprocess(image, output_type=output_type)
        # On the CPU, because the plan of a GPU's memory knows of no further copy of all images.
        finished = finish(self.image_processor.postprocess(image, output_type="pt").cpu().float())
        if output_type == "pt":
            return finished.to(image.device)
        return self.image_processor.postprocess(finished, output_type, do_denormalize=[False] * len(finished))


class Decodes(TakesTurns):
    """The method of a pipeline that turns latents into images. `Pipeline` sets the attributes."""

    decoder: Decoder
    vae: Any
    device: torch.device
    _vae_in_memory: Callable[[], AbstractContextManager[None]]

    @one_at_a_time
    @tells_of_memory
    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int, output_type: OutputType = "pil") -> Any:
        """Decode what a call with ``output_type="latent"`` returned, to the images that it would have returned otherwise.

        Args:
            latents: packed, [B, N, 64], N = height / 16 * width / 16.
            height, width: of the images, in pixels, multiples of 16.
            output_type: "pil", "np" or "pt", see `PipelineOutput`.

        Raises:
            InputError: the latents have another shape.
            NumericalError: they or the images hold NaN or infinity.
        """
        if height % PATCH or width % PATCH:
            raise InputError(f"height and width must be multiples of {PATCH}, got {height} and {width}")
        check_tensor(
            "latents", latents, (len(latents), height // PATCH * (width // PATCH), 4 * self.vae.config.latent_channels)
        )
        with self._vae_in_memory():
            return self.decoder(latents.to(self.device), height, width, output_type)
