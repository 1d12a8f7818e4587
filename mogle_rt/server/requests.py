"""What a request may ask for: its fields, their ranges, and the limits of this server."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from mogle_rt.config import PATCH
from mogle_rt.server.refusals import Refusal

MOST_IMAGES = 10  # of one request, as OpenAI has it
MOST_PROMPT = 4000  # characters, as OpenAI has it; the text encoders read far fewer
SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


@dataclass(frozen=True)
class Limits:
    """What one request may take of this server.

    Attributes:
        pixels: the most pixels of an image, and of a mask that is sent.
        steps: the most denoising steps.
        upload: the most bytes of a request.
        seconds: the longest time in which a request must arrive.
    """

    pixels: int = 1024 * 1024
    steps: int = 100
    upload: int = 16 << 20
    seconds: float = 30.0
    mask_pixels: int = 2048 * 2048


class GenerationRequest(BaseModel):
    """The fields of ``POST /v1/images/generations``: those of OpenAI's API that make sense here, and this model's own."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = Field("", max_length=MOST_PROMPT, description="What the face looks like.")
    model: str | None = Field(None, description="The model's name, as GET /v1/models tells it.")
    n: int = Field(1, ge=1, le=MOST_IMAGES, description="Images to draw; image i has the seed plus i.")
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, multiples of 16; auto takes the mask's shape.")
    response_format: Literal["b64_json"] = Field("b64_json", description="Images come as base64; none is stored.")
    output_format: Literal["png", "jpeg"] = Field("png", description="The kind of image files.")
    stream: bool = Field(False, description="Answer with server-sent events: progress, previews and images.")
    partial_images: int = Field(0, ge=0, le=100, description="With stream: the most previews of each image.")
    semantic_mask: str | None = Field(None, description="A mask's file, as base64 or a data: URL, or uploaded.")
    mask_order: Literal["celebamask", "bisenet", "farl"] = Field("celebamask", description="What its numbers mean.")
    seed: int | None = Field(None, ge=0, le=2**53, description="Of the first image; without it, a random one.")
    num_inference_steps: int = Field(28, ge=1, description="Denoising steps.")
    guidance_scale: float = Field(3.5, ge=0, le=1000)
    condition_scale: float = Field(1.0, ge=0, le=1000, description="The mask's strength; 1 is as trained, 0 is none.")
    user: str | None = Field(None, max_length=1000, description="Accepted and not used.")
    quality: Literal["auto", "standard"] | None = Field(None, description="Accepted and not used.")
    background: Literal["auto", "opaque"] | None = Field(None, description="Accepted and not used.")
    moderation: Literal["auto", "low"] | None = Field(None, description="Accepted and not used.")

    @field_validator("size")
    @classmethod
    def _is_size(cls, size: str | None) -> str | None:
        if size is None or size == "auto":
            return None
        found = SIZE.fullmatch(size)
        if found is None:
            raise ValueError(f"must be WIDTHxHEIGHT, such as 512x512, or auto, got {size[:40]!r}")
        for name, side in zip(("width", "height"), map(int, found.groups()), strict=True):
            if side < PATCH or side % PATCH:
                nearest = max(PATCH, round(side / PATCH) * PATCH)
                raise ValueError(f"the {name} must be a multiple of {PATCH}, got {side}; the nearest is {nearest}")
        return size

    @field_validator("prompt")
    @classmethod
    def _is_text(cls, prompt: str) -> str:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ValueError("must be text; it holds half of a surrogate pair") from None
        return prompt

    @property
    def height_and_width(self) -> tuple[int, int] | None:
        """Pixels, or None where the size follows from the mask."""
        if self.size is None:
            return None
        width, height = map(int, self.size.split("x"))
        return height, width

    def check(self, limits: Limits, model: str) -> None:
        """Check what the fields alone can't know.

        Raises:
            Refusal: the model is another, more is asked for than the server gives, or nothing is.
        """
        if self.model is not None and self.model != model:
            message = f"there is no model {self.model[:60]!r} here; this server has {model!r}"
            raise Refusal(404, message, code="model_not_found", param="model")
        if self.num_inference_steps > limits.steps:
            message = (
                f"num_inference_steps can be at most {limits.steps} on this server, got {self.num_inference_steps}"
            )
            raise Refusal(422, message, code="too_many_steps", param="num_inference_steps")
        if self.height_and_width is not None:
            check_pixels(*self.height_and_width, limits)
        if not self.prompt.strip() and self.semantic_mask is None:
            raise Refusal(422, "give a prompt, a semantic_mask, or both", code="nothing_to_draw", param="prompt")


def check_pixels(height: int, width: int, limits: Limits) -> None:
    """Refuse an image that is larger than this server draws.

    Raises:
        Refusal: it has too many pixels.
    """
    if height * width > limits.pixels:
        message = f"an image can have at most {limits.pixels:,} pixels on this server, got {width} x {height}"
        raise Refusal(422, message, code="too_many_pixels", param="size")
