"""What a request may ask for: its fields, their ranges, and the limits of this server."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from mogle_rt.config import PATCH
from mogle_rt.server.refusals import Refusal

MOST_IMAGES = 10  # of one request, as OpenAI has it
MOST_PROMPT = 4000  # characters, as OpenAI has it; the text encoders read far fewer
MOST_SEED = 2**53  # JSON's numbers are exact up to here
MOST_SCALE = 1000
MOST_MARGIN = 256  # pixels; the time to grow a region rises with it
SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


@dataclass(frozen=True)
class Limits:
    """What one request may take of this server.

    Attributes:
        pixels: the most pixels of an image.
        steps: the most denoising steps.
        upload: the most bytes of a request.
        seconds: the longest time in which a request must arrive.
        mask_pixels: the most pixels of a mask that is sent.
    """

    pixels: int = 1024 * 1024
    steps: int = 100
    upload: int = 16 << 20
    seconds: float = 30.0
    mask_pixels: int = 2048 * 2048


class ImagesRequest(BaseModel):
    """The fields of every request for images: those of OpenAI's API that make sense here, and this model's own.

    Fields in ``FILES`` are files: uploaded in a form under the name that stands there or under the field's own, or as
    base64.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    FILES: ClassVar[Mapping[str, str]] = {}

    model: str | None = Field(None, description="The model's name, as GET /v1/models tells it.")
    n: int = Field(1, ge=1, le=MOST_IMAGES, description="Images to draw; image i has the seed plus i.")
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, multiples of 16; auto takes the mask's shape.")
    response_format: Literal["b64_json"] = Field("b64_json", description="Images come as base64; none is stored.")
    output_format: Literal["png", "jpeg"] = Field("png", description="The kind of image files.")
    stream: bool = Field(False, description="Answer with server-sent events: progress, previews and images.")
    partial_images: int = Field(0, ge=0, le=100, description="With stream: the most previews of each image.")
    semantic_mask: str | None = Field(None, description="A mask's file, as base64 or a data: URL, or uploaded.")
    mask_order: Literal["celebamask", "bisenet", "farl"] = Field("celebamask", description="What its numbers mean.")
    seed: int | None = Field(None, ge=0, le=MOST_SEED, description="Of the first image; without it, a random one.")
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

    @field_validator("prompt", check_fields=False)
    @classmethod
    def _is_text(cls, prompt: str | None) -> str | None:
        try:
            (prompt or "").encode()
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
            Refusal: the model is another, or more is asked for than the server gives.
        """
        if self.model is not None and self.model != model:
            message = f"there is no model {self.model[:60]!r} here; this server has {model!r}"
            raise Refusal(404, message, code="model_not_found", param="model")
        if self.height_and_width is not None:
            check_pixels(*self.height_and_width, limits)


class GenerationRequest(ImagesRequest):
    """The fields of ``POST /v1/images/generations``."""

    FILES = {"semantic_mask": "mask"}

    prompt: str = Field("", max_length=MOST_PROMPT, description="What the face looks like.")
    num_inference_steps: int = Field(28, ge=1, description="Denoising steps.")
    guidance_scale: float = Field(3.5, ge=0, le=MOST_SCALE)
    condition_scale: float = Field(
        1.0, ge=0, le=MOST_SCALE, description="The mask's strength; 1 is as trained, 0 is none."
    )

    def check(self, limits: Limits, model: str) -> None:
        """See `ImagesRequest.check`; and there must be something to draw."""
        super().check(limits, model)
        check_steps(self.num_inference_steps, limits)
        if not self.prompt.strip() and self.semantic_mask is None:
            raise Refusal(422, "give a prompt, a semantic_mask, or both", code="nothing_to_draw", param="prompt")


class EditRequest(ImagesRequest):
    """The fields of ``POST /v1/images/edits``. What is None is taken from the image's own settings where it has them."""

    FILES = {
        "image": "image[]",
        "semantic_mask": "semantic_mask",
        "semantic_mask_before": "semantic_mask_before",
        "mask": "mask",
    }

    image: str | None = Field(None, description="The image's file, as base64 or a data: URL, or uploaded.")
    mask: str | None = Field(None, description="A picture of the image's size, transparent where it is drawn anew.")
    semantic_mask_before: str | None = Field(None, description="The mask that belongs to the image, if it holds none.")
    prompt: str | None = Field(None, max_length=MOST_PROMPT, description="What the result shows.")
    num_inference_steps: int | None = Field(None, ge=1, description="Denoising steps.")
    guidance_scale: float | None = Field(None, ge=0, le=MOST_SCALE)
    condition_scale: float | None = Field(None, ge=0, le=MOST_SCALE)
    strength: float | None = Field(None, gt=0, le=1, description="How much noise the region starts with.")
    regions: str = Field("", max_length=500, description="Classes to draw anew even where the masks agree: hair,hat.")
    keep: str = Field("", max_length=500, description="Classes that stay even beside a change: nose,mouth.")
    margin: int | None = Field(None, ge=0, le=MOST_MARGIN, description="Pixels by which the region is grown.")
    input_fidelity: Literal["low", "high"] | None = Field(None, description="Accepted and not used.")

    def check(self, limits: Limits, model: str) -> None:
        """See `ImagesRequest.check`; and there must be an image."""
        super().check(limits, model)
        if self.image is None:
            raise Refusal(422, "give the image to edit, as a file or as base64", code="no_image", param="image")


def check_steps(steps: int, limits: Limits) -> None:
    """Refuse more steps than this server takes.

    Raises:
        Refusal: there are too many.
    """
    if steps > limits.steps:
        message = f"num_inference_steps can be at most {limits.steps} on this server, got {steps}"
        raise Refusal(422, message, code="too_many_steps", param="num_inference_steps")


def check_pixels(height: int, width: int, limits: Limits) -> None:
    """Refuse an image that is larger than this server draws.

    Raises:
        Refusal: it has too many pixels.
    """
    if height * width > limits.pixels:
        message = f"an image can have at most {limits.pixels:,} pixels on this server, got {width} x {height}"
        raise Refusal(422, message, code="too_many_pixels", param="size")
