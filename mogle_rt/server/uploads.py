"""What a client sends: read within limits, as JSON or as a form, and its masks as labels. Nothing of it names a file."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import re
import threading
import warnings
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from mogle_rt.errors import MaskError
from mogle_rt.masks.classes import Labels
from mogle_rt.masks.files import FORMATS, open_picture
from mogle_rt.masks.labels import from_planes, resize, to_labels
from mogle_rt.masks.planes import part_of
from mogle_rt.masks.sizes import default_size, warn_of_distortion, warn_of_other_size
from mogle_rt.server.refusals import Refusal, of_validation
from mogle_rt.server.requests import GenerationRequest, Limits

MOST_PARTS = 40  # of a form
DATA_URL = re.compile(r"data:[\w.+/-]*;base64,", re.ASCII)
_one_at_a_time = threading.Lock()  # warnings are caught for the whole process; and decoding takes memory


class MaskFile(NamedTuple):
    """A file that was sent: its name, which is only compared with those of part files, and its contents."""

    name: str
    data: bytes


Form = dict[str, Any]


async def read_form(request: Request, limits: Limits) -> tuple[Form, list[MaskFile]]:
    """Read the fields and files of a form.

    Raises:
        Refusal: it is too large, too slow, or damaged.
    """
    parser = MultiPartParser(
        request.headers,
        _limited(request, limits),
        max_files=MOST_PARTS,
        max_fields=MOST_PARTS,
        max_part_size=limits.upload,
    )
    try:
        async with asyncio.timeout(limits.seconds):
            form = await parser.parse()
    except TimeoutError:
        raise _too_slow(limits) from None
    except (Refusal, ClientDisconnect):
        raise
    except MultiPartException as error:
        raise Refusal(400, f"the form can't be read: {error.message}", code="invalid_form") from None
    except Exception:  # the parser passes some errors of damaged forms on as they are
        raise Refusal(
            400, "the form can't be read; send multipart/form-data as browsers do", code="invalid_form"
        ) from None
    fields: Form = {}
    files = []
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in ("semantic_mask", "mask"):
                    raise Refusal(
                        422, f"unknown file {name[:60]!r}; a mask goes into semantic_mask", code="unknown_field"
                    )
                files.append(MaskFile(value.filename or "", await value.read()))
            elif name in fields:
                raise Refusal(422, f"{name[:60]!r} is given twice", code="invalid_value")
            else:
                fields[name] = value
    finally:
        await form.close()
    return fields, files


async def read_request(request: Request, limits: Limits) -> tuple[GenerationRequest, list[MaskFile]]:
    """Read a request for images: JSON, or a form with the mask as a file.

    Raises:
        Refusal: the body is too large, too slow, of another kind, damaged, or a field is wrong.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    known = list(GenerationRequest.model_fields)
    if kind == "application/json":
        body = await _read_body(request, limits)
        files: list[MaskFile] = []
    elif kind == "multipart/form-data":
        fields, files = await read_form(request, limits)
    else:
        message = f"the body must be application/json or multipart/form-data, got {kind[:60] or 'no content type'!r}"
        raise Refusal(415, message, code="unsupported_media_type")
    try:
        if kind == "application/json":
            parsed = GenerationRequest.model_validate_json(body, strict=True)
        else:
            parsed = GenerationRequest.model_validate_strings(fields, strict=False)
    except ValidationError as error:
        raise of_validation(error, known) from None
    if parsed.semantic_mask is not None:
        if files:
            raise Refusal(422, "give semantic_mask once, as base64 or as a file", param="semantic_mask")
        files = [MaskFile("", _from_base64(parsed.semantic_mask))]
    elif files:
        parsed.semantic_mask = ""  # it is there
    return parsed, files


def read_masks(files: list[MaskFile], order: str, limits: Limits) -> tuple[Labels, list[str]]:
    """The labels of a mask, uint8 [H, W], and what the person should know about how it was read.

    Several files must be the parts of one face, named as CelebAMask-HQ names them.

    Raises:
        Refusal: a file can't be read as a mask, or is too large.
    """
    with noted_warnings() as told:
        try:
            for file in files:
                _check_size(file, limits)
            one = len(files) == 1
            labels = to_labels(files[0].data, order=order) if one else from_planes(_parts(files))
        except MaskError as error:
            raise Refusal(422, str(error), code="invalid_mask", param="semantic_mask") from None
    return labels, told


def fitted(labels: Labels | None, size: tuple[int, int] | None, side: int) -> tuple[Labels, list[str]]:
    """Labels in the size of the image, and what the person should know about this size.

    Args:
        labels: [H, W]; None takes background alone.
        size: height and width; None takes the mask's shape.
        side: of the model's own square.
    """
    every = [] if labels is None else [labels]
    height, width = size or (default_size(every, side) if every else (side, side))
    with noted_warnings() as told:
        warn_of_distortion(every, height, width)
        warn_of_other_size(height, width, side)
    if labels is None:
        return np.zeros((height, width), dtype=np.uint8), told
    return resize(labels, height, width), told


@contextmanager
def noted_warnings() -> Iterator[list[str]]:
    """The warnings within this context, as texts. Those of pipelines that draw meanwhile are left out."""
    told: list[str] = []
    with _one_at_a_time, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield told
        told += [str(one.message) for one in caught if Path(one.filename).name != "pipeline.py"]


def _check_size(file: MaskFile, limits: Limits) -> None:
    """Refuse a picture that is large when decoded, by its header alone."""
    try:
        with Image.open(io.BytesIO(file.data), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        width = height = 2**20
    except Exception:  # what it is then is told by the reading itself
        return
    if width * height > limits.mask_pixels:
        raise MaskError(f"a mask can have at most {limits.mask_pixels:,} pixels on this server, got {width} x {height}")


def _parts(files: list[MaskFile]) -> dict[str, NDArray[Any]]:
    """The planes of one face's part files, by class."""
    parts: dict[str, NDArray[Any]] = {}
    faces = set()
    for file in files:
        face, name = part_of(file.name)
        faces.add(face)
        if name in parts:
            raise MaskError(f"the plane of {name} is given twice")
        parts[name] = _plane(file)
    if len(faces) > 1:
        raise MaskError(f"these are parts of {len(faces)} faces; give those of one")
    return parts


def _plane(file: MaskFile) -> NDArray[Any]:
    plane = np.asarray(open_picture(io.BytesIO(file.data), file.name[:60]).convert("L"))
    return (plane > (0 if plane.max(initial=0) == 1 else 127)).astype(np.uint8)


def _from_base64(text: str) -> bytes:
    found = DATA_URL.match(text)
    try:
        return base64.b64decode(text[found.end() if found else 0 :], validate=True)
    except (binascii.Error, ValueError):
        message = "semantic_mask must be a file's contents in base64; paths and addresses are not opened"
        raise Refusal(400, message, code="invalid_base64", param="semantic_mask") from None


async def _read_body(request: Request, limits: Limits) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(limits.seconds):
            async for part in _limited(request, limits):
                body += part
    except TimeoutError:
        raise _too_slow(limits) from None
    return bytes(body)


async def _limited(request: Request, limits: Limits) -> AsyncGenerator[bytes, None]:
    """The body, part by part, until it is too large."""
    message = f"a request can have at most {limits.upload:,} bytes"
    too_large = Refusal(413, message, code="too_large", headers={"Connection": "close"})
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > limits.upload:
        raise too_large
    received = 0
    async for part in request.stream():
        received += len(part)
        if received > limits.upload:
            raise too_large
        yield part


def _too_slow(limits: Limits) -> Refusal:
    message = f"the request did not arrive within {limits.seconds:g} seconds"
    return Refusal(408, message, code="too_slow", headers={"Connection": "close"})
