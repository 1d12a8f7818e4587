"""Edits that clients ask for: the image with the settings inside it, its masks, and which pixels are drawn anew."""

from __future__ import annotations

import io
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from mogle_rt.arguments import check_options
from mogle_rt.config import DEFAULT_GUIDANCE
from mogle_rt.edits.images import to_pixels
from mogle_rt.edits.methods import EDIT_STRENGTH, IMAGE_STRENGTH
from mogle_rt.edits.preparation import start_of_edit, start_of_image
from mogle_rt.edits.start import StartImage
from mogle_rt.errors import InputError, MaskError
from mogle_rt.jobs.settings_read import ImageSettings, read_settings
from mogle_rt.masks.classes import Labels
from mogle_rt.masks.files import open_picture, transparent
from mogle_rt.server.asked.bodies import Files, SentFile
from mogle_rt.server.asked.masks import check_size, noted_warnings, read_masks
from mogle_rt.server.asked.requests import EditRequest, Limits, check_steps
from mogle_rt.server.refusals import Refusal

T = TypeVar("T")


class AskedEdit(NamedTuple):
    """An edit, ready to be drawn.

    Attributes:
        start: one image to start from.
        labels: [H, W], the mask of the result.
        options: prompt, seed (None if neither the request nor the image says one), steps and scales of the call.
        warnings: what the person should know.
    """

    start: StartImage
    labels: Labels
    prompt: str
    seed: int | None
    options: dict[str, Any]
    warnings: list[str]


def read_image_settings(files: list[SentFile], limits: Limits) -> tuple[ImageSettings, Labels | None]:
    """What an image was drawn with, and the mask [H, W] inside it, if it holds one.

    Raises:
        Refusal: there are several files, or it can't be read, is too large, or holds a damaged mask.
    """
    if len(files) != 1:
        raise Refusal(422, f"give one image, got {len(files)}", code="invalid_value", param="image")
    try:
        check_size(files[0].data, limits.pixels, "an image")
        known = read_settings(io.BytesIO(files[0].data), "the image")
        return known, known.labels
    except (InputError, MaskError) as error:
        raise Refusal(422, str(error), code="invalid_image", param="image") from None


def read_edit(asked: EditRequest, files: Files, limits: Limits, *, bundle: str) -> AskedEdit:
    """Make an edit of a request and its files.

    Where ``semantic_mask``, ``mask`` or ``regions`` are given, they say what is drawn anew. Without any of them, all of the
    image is.

    Args:
        bundle: the hash of this server's bundle.

    Raises:
        Refusal: something can't be read, or doesn't fit the rest, or is missing.
    """
    known, own = read_image_settings(files["image"], limits)
    told: list[str] = []

    def masks(field: str) -> Labels | None:
        if field not in files:
            return None
        labels, warnings = read_masks(files[field], asked.mask_order, limits, field)
        told.extend(warnings)
        return labels

    before, after = masks("semantic_mask_before"), masks("semantic_mask")
    before = own if before is None else before
    with noted_warnings() as noted:
        try:
            pixels = to_pixels(files["image"][0].data)
            height, width = pixels.shape[2:]
            if asked.height_and_width not in (None, (height, width)):
                message = f"size must be the image's, {width}x{height}, or left out, got {asked.size}"
                raise Refusal(422, message, code="invalid_value", param="size")
            area = read_area(files["mask"], height, width, limits) if "mask" in files else None
            strength = asked.strength
            if after is None and area is None and not asked.regions:
                if before is None:
                    told.append("no mask is given and the image holds none, so it is taken to be background alone")
                start, (labels,) = start_of_image(pixels, before, first(strength, IMAGE_STRENGTH))
            else:
                if before is None and (after is None or area is None):
                    message = (
                        "give the mask that belongs to the image as semantic_mask_before; the image itself holds none"
                    )
                    raise Refusal(422, message, code="no_mask", param="semantic_mask_before")
                start, (labels,) = start_of_edit(
                    pixels,
                    first(before, after),
                    first(after, before),
                    first(strength, EDIT_STRENGTH),
                    keep=asked.keep or (),
                    regions=asked.regions or (),
                    area=area,
                    margin=asked.margin,
                )
            options: dict[str, Any] = {
                "num_inference_steps": first(asked.num_inference_steps, known.steps, 28),
                "guidance_scale": first(asked.guidance_scale, known.guidance_scale, DEFAULT_GUIDANCE),
                "condition_scale": first(asked.condition_scale, known.condition_scale, 1.0),
            }
            check_steps(options["num_inference_steps"], limits)
            check_options(**options)
            start.first_step(options["num_inference_steps"], 1, height, width)
        except (InputError, MaskError) as error:
            raise Refusal(422, str(error), code="invalid_value") from None
    if known.bundle_sha256 not in (None, bundle):
        told.append("the image was drawn by another model")
    return AskedEdit(
        start=start,
        labels=labels,
        prompt=first(asked.prompt, known.prompt, ""),
        seed=asked.seed if asked.seed is not None else known.seed,
        options=options,
        warnings=told + noted,
    )


def read_area(files: list[SentFile], height: int, width: int, limits: Limits) -> NDArray[np.bool_]:
    """The pixels [H, W] that are to be drawn anew: where a picture of the image's size is transparent, as OpenAI has it.

    Raises:
        InputError: there are several files, or it has another size or no transparent pixels.
        MaskError: it can't be read as a picture, or is too large.
    """
    if len(files) != 1:
        raise InputError(f"give one mask, got {len(files)} files")
    check_size(files[0].data, limits.mask_pixels, "a mask")
    picture = open_picture(io.BytesIO(files[0].data), "mask")
    if picture.size != (width, height):
        raise InputError(
            f"mask must have the image's size, {width} x {height} pixels, got {picture.width} x {picture.height}"
        )
    area = transparent(picture, "mask")
    if area is None:
        raise InputError(
            "mask must be a picture that is transparent where the image is to be drawn anew; a mask of classes goes into "
            "semantic_mask"
        )
    return area


def first(*values: T | None) -> T:
    """The first value that is there."""
    return next(value for value in values if value is not None)
