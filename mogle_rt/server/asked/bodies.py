"""The body of a request: read within limits, as JSON or as a form, into fields and files. No name in it is a path here."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import AsyncGenerator, Mapping
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from mogle_rt.server.asked.requests import ImagesRequest, Limits
from mogle_rt.server.refusals import Refusal, of_validation

MOST_PARTS = 40  # of a form
DATA_URL = re.compile(r"data:[\w.+/-]*;base64,", re.ASCII)


class SentFile(NamedTuple):
    """A file that was sent: its name, which is only compared with those of part files, and its contents."""

    name: str
    data: bytes


Fields = dict[str, Any]
Files = dict[str, list[SentFile]]  # by the name of their field
R = TypeVar("R", bound=ImagesRequest)


async def read_form(request: Request, limits: Limits, names: Mapping[str, str]) -> tuple[Fields, Files]:
    """Read the fields and files of a form.

    Args:
        names: of the fields that are files, each with another name that stands for it.

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
    fields: Fields = {}
    files: Files = {}
    others = {other: name for name, other in names.items()}
    try:
        for sent_as, value in form.multi_items():
            name = others.get(sent_as, sent_as)
            if isinstance(value, UploadFile):
                if name not in names:
                    message = f"unknown file {name[:60]!r}; files are {', '.join(names)}"
                    raise Refusal(422, message, code="unknown_field", param=name[:60])
                files.setdefault(name, []).append(SentFile(value.filename or "", await value.read()))
            elif name in fields:
                raise Refusal(422, f"{name[:60]!r} is given twice", code="invalid_value")
            else:
                fields[name] = value
    finally:
        await form.close()
    return fields, files


async def read_request(request: Request, limits: Limits, kind: type[R]) -> tuple[R, Files]:
    """Read a request for images: JSON, or a form with its files.

    Args:
        kind: of request: its fields, and which of them are files.

    Returns:
        The request, whose fields are not None where a file was sent, and the files.

    Raises:
        Refusal: the body is too large, too slow, of another kind, damaged, or a field is wrong.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    files: Files = {}
    try:
        if media == "application/json":
            parsed = kind.model_validate_json(await _read_body(request, limits), strict=True)
        elif media == "multipart/form-data":
            fields, files = await read_form(request, limits, kind.FILES)
            parsed = kind.model_validate_strings(fields, strict=False)
        else:
            message = (
                f"the body must be application/json or multipart/form-data, got {media[:60] or 'no content type'!r}"
            )
            raise Refusal(415, message, code="unsupported_media_type")
    except ValidationError as error:
        raise of_validation(error, list(kind.model_fields)) from None
    for name in kind.FILES:
        text = getattr(parsed, name)
        if name in files:
            if text is not None:
                raise Refusal(422, f"give {name} once, as base64 or as a file", code="invalid_value", param=name)
            setattr(parsed, name, "")  # it is there
        elif text is not None:
            files[name] = [SentFile("", _from_base64(text, name))]
    return parsed, files


def _from_base64(text: str, name: str) -> bytes:
    found = DATA_URL.match(text)
    try:
        return base64.b64decode(text[found.end() if found else 0 :], validate=True)
    except (binascii.Error, ValueError):
        message = f"{name} must be a file's contents in base64; paths and addresses are not opened"
        raise Refusal(400, message, code="invalid_base64", param=name) from None


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
