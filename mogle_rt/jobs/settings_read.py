"""Read back what was written into an image: its settings, and the mask that it was drawn from."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeAlias
from xml.sax.saxutils import unescape

from PIL import Image

from mogle_rt.errors import ConfigError, InputError, MaskError
from mogle_rt.masks.classes import Labels
from mogle_rt.masks.files import FORMATS, one_line
from mogle_rt.masks.labels import to_image, to_labels
from mogle_rt.values import Range, Sha256, parsed, read_json

MASK_LIMIT = 48_000  # characters: a JPEG's XMP packet must have room for the rest
Seed: TypeAlias = Annotated[int, Range(0, 2**63 - 3)]
Steps: TypeAlias = Annotated[int, Range(1, 10_000)]
_DESCRIPTION = re.compile(r'<dc:description><rdf:Alt><rdf:li xml:lang="x-default">(.*?)</rdf:li>', re.DOTALL)


@dataclass(frozen=True)
class ImageSettings:
    """What an image was drawn with, as far as it says so; None where it doesn't."""

    prompt: str | None = None
    seed: Seed | None = None
    steps: Steps | None = None
    guidance_scale: float | None = None
    condition_scale: float | None = None
    model_config: Mapping[str, bool] | None = None
    bundle_sha256: Sha256 | None = None
    mask: str | None = None
    mask_png: str | None = None

    @property
    def labels(self) -> Labels | None:
        """The mask that the image was drawn from, uint8 [H, W], or None if it isn't in the image.

        Raises:
            InputError: what stands there is no mask.
        """
        if self.mask_png is None:
            return None
        try:
            with Image.open(io.BytesIO(base64.b64decode(self.mask_png, validate=True)), formats=("PNG",)) as image:
                return to_labels(image)
        except (MaskError, OSError, binascii.Error, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"the mask within the image can't be read: {one_line(error)}") from None


def mask_text(labels: Labels) -> str | None:
    """A mask as text, to be written into the image that was drawn from it; None if that would take too much room."""
    buffer = io.BytesIO()
    to_image(labels).save(buffer, "PNG", optimize=True)
    text = base64.b64encode(buffer.getvalue()).decode()
    return text if len(text) <= MASK_LIMIT else None


def read_settings(path: Path | BinaryIO, name: str | None = None) -> ImageSettings:
    """The settings in an image that this package wrote; empty ones in any other image.

    Args:
        path: of the image's file, or a stream of its contents.
        name: of the image in errors; None takes the path.

    Raises:
        InputError: the file can't be read, or its settings are not of this package's form.
    """
    name = str(path) if name is None else name
    try:
        with Image.open(path, formats=FORMATS) as image:
            packet = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or ""
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except Exception as error:  # decoders can raise nearly any error when a file is damaged
        raise InputError(f"{name}: can't be read as an image: {one_line(error)}") from None
    text = packet.decode(errors="replace") if isinstance(packet, bytes) else str(packet)
    found = _DESCRIPTION.search(text)
    values: Any = None
    if found is not None:
        try:
            values = read_json(unescape(found[1]))
        except ValueError:
            values = None  # a description that somebody else wrote
    if not isinstance(values, Mapping) or "software" not in values:
        return ImageSettings()
    names = {field.name for field in fields(ImageSettings)}
    try:
        settings = parsed(ImageSettings, {n: v for n, v in values.items() if n in names}, "the settings")
    except ConfigError as error:
        raise InputError(f"{name}: {error}") from None
    assert isinstance(settings, ImageSettings)
    return settings
