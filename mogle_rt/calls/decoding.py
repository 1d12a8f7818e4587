"""Decode packed latents to images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from mogle_rt.calls.results import OutputType
from mogle_rt.config import VAE_SCALE
from mogle_rt.encoders.group_norm import arranged
from mogle_rt.encoders.vae import DECODE_PIXELS, unpack_latents
from mogle_rt.errors import NumericalError


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
        # A CPU is faster with one image at a time, because the activations then stay in its caches.
        chunk = 1 if packed.device.type == "cpu" else max(1, DECODE_PIXELS // (height * width))
        image = torch.cat([self.vae.decode(part).sample.contiguous() for part in z.split(chunk)])
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
