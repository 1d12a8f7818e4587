"""Write images atomically, with their settings, and marked as AI-generated."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mogle_rt import __version__
from mogle_rt.bundle.files import atomic_write
from mogle_rt.errors import OutputError

if TYPE_CHECKING:
    from mogle_rt.pipeline import Pipeline

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
JPEG_XMP_LIMIT = 65_504  # bytes: a JPEG segment's 65,533, less the XMP namespace at its start
ROOM_FOR_OTHERS = 4096  # bytes for all settings but the prompt
MASK = "mask_png"  # the setting that holds the mask itself, see `mogle_rt.jobs.settings_read.mask_text`
DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


def check_suffix(path: Path) -> str:
    """The image format that a file name's suffix stands for.

    Raises:
        OutputError: the suffix stands for neither PNG nor JPEG.
    """
    try:
        return SUFFIXES[path.suffix.lower()]
    except KeyError:
        raise OutputError(
            f"{path}: images are written as {', '.join(SUFFIXES)}, not {path.suffix or 'no suffix'!r}"
        ) from None


def check_prompt(path: Path, prompt: str) -> None:
    """Check that a JPEG can hold the prompt, before the image is drawn; a PNG holds any.

    Raises:
        OutputError: it can't.
    """
    size = len(xmp({"prompt": prompt})) + ROOM_FOR_OTHERS
    if check_suffix(path) == "JPEG" and size > JPEG_XMP_LIMIT:
        raise OutputError(f"{path}: a JPEG can't hold settings of {size} bytes; write a PNG, or no metadata")


def xmp(settings: Mapping[str, Any] | None) -> bytes:
    """Make an XMP packet with the IPTC digital source type, and with the settings as JSON in dc:description."""
    description = ""
    if settings is not None:
        text = escape(json.dumps(settings, ensure_ascii=False))
        for character in "\ufffe\uffff":  # XML doesn't allow these two
            text = text.replace(character, f"\\u{ord(character):x}")
        description = (
            f'<dc:description><rdf:Alt><rdf:li xml:lang="x-default">{text}</rdf:li></rdf:Alt></dc:description>'
        )
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/" '
        'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
        f"<Iptc4xmpExt:DigitalSourceType>{DIGITAL_SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>"
        f'{description}</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode(errors="backslashreplace")  # bytes of a file's name that are not text become JSON's escapes


def settings_of(
    pipe: Pipeline,
    size: tuple[int, int],
    *,
    prompt: str,
    seed: int,
    mask: str | None,
    num_inference_steps: int,
    guidance_scale: float,
    condition_scale: float,
) -> dict[str, Any]:
    """The settings that are written into an image: those of the call, and what of the pipeline changes the result.

    Args:
        size: width and height in pixels. mask: its file's name, if it is known.
    """
    settings = {
        "prompt": prompt,
        "seed": seed,
        "mask": mask,
        "steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "size": list(size),
        "condition_scale": condition_scale,
        "model_config": pipe.model_config.to_dict(),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "bundle_sha256": pipe.bundle.content_hash,
        "software": f"mogle_rt {__version__}",
    }
    return settings if pipe.fast is None else settings | {"fast": str(pipe.fast)}


def encode_image(image: Image.Image, kind: str, settings: Mapping[str, Any] | None = None, quality: int = 95) -> bytes:
    """The contents of an image file.

    Args:
        image: RGB.
        kind: "PNG" or "JPEG".
        settings: prompt, seed and so on, as values that JSON can hold, to write into the file; None leaves them out.
            A JPEG is written without the mask if there is no room for it. The mark of AI generation (IPTC
            DigitalSourceType trainedAlgorithmicMedia) is always written.
        quality: of a JPEG, from 1 to 95.

    Raises:
        OutputError: the settings are too large for a JPEG.
    """
    packet = xmp(settings)
    if kind == "JPEG" and settings is not None and len(packet) > JPEG_XMP_LIMIT:
        packet = xmp({key: value for key, value in settings.items() if key != MASK})
    buffer = io.BytesIO()
    if kind == "PNG":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", packet.decode())
        for key, value in (settings or {}).items():
            if key == MASK:  # once is enough, in the packet
                continue
            text = value if isinstance(value, str) else json.dumps(value)
            info.add_itxt(key, text.encode(errors="backslashreplace").decode())
        image.save(buffer, kind, pnginfo=info)
    else:
        if len(packet) > JPEG_XMP_LIMIT:
            raise OutputError(f"a JPEG can't hold settings of {len(packet)} bytes; write a PNG, or no metadata")
        image.save(buffer, kind, quality=quality, subsampling=0, xmp=packet)
    return buffer.getvalue()


def save_image(image: Image.Image, path: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Write a PNG or JPEG.

    Args:
        image, settings: see `encode_image`.
        path: a name that ends in .png, .jpg or .jpeg. An existing file is replaced only when the new one is complete.

    Raises:
        OutputError: the suffix is another, the settings are too large for a JPEG, or the file can't be written.
    """
    kind = check_suffix(path)
    try:
        data = encode_image(image, kind, settings)
    except OutputError as error:
        raise OutputError(f"{path}: {error}") from None
    with atomic_write(path) as f:
        f.write(data)
