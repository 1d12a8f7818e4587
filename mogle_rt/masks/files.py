"""Read masks from files and PIL images safely, and as a person sees them, with orientation and transparency applied."""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mogle_rt.errors import InputError, MaskError, printable

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats that are read. Pillow reads many more, some of them by starting other programs."""
LOSSY = ("JPEG", "MPO")
MAX_PIXELS = 4096 * 4096
"""The most pixels of a mask. A file's header is checked for this before anything is decoded."""
MOST_VALUES = 20 * MAX_PIXELS  # of an array that holds a plane for each class
NPY = b"\x93NUMPY"  # the first bytes of a .npy file
NUMBER_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")
ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
ORIENTATION = 0x0112  # the EXIF tag

_ADDRESS = re.compile(r"(https?|ftp|s3|gs|hf|file):/|data:")


def local_path(path: str | os.PathLike[str]) -> Path:
    """The path of a mask, with ``~`` expanded.

    Raises:
        MaskError: it is an address; masks are not downloaded.
    """
    text = os.fsdecode(path)
    if _ADDRESS.match(text):
        raise MaskError(f"{one_line(text)}: masks are not fetched from addresses; save the file and give its path")
    return Path(os.path.expanduser(text))


@contextmanager
def decodable(what: str, kind: str, refusal: type[InputError]) -> Iterator[None]:
    """Within it, whatever goes wrong with a picture's file is told in one line.

    Args:
        what: the picture's name in errors.
        kind: what the picture is meant to be, with its article, such as "a mask".
        refusal: the error to raise.
    """
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise refusal(f"{what}: no such file") from None
    except IsADirectoryError:
        raise refusal(f"{what}: is a folder, not {kind}") from None
    except UnidentifiedImageError:
        formats = ", ".join(FORMATS) + (", or .npy" if refusal is MaskError else "")
        raise refusal(f"{what}: not {kind} that can be read ({formats})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise refusal(f"{what}: too large: {kind} can have at most {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # decoders can raise nearly any error when a file is damaged
        raise refusal(f"{what}: can't be read: {one_line(error)}") from None


def open_picture(source: Path | BinaryIO, what: str | None = None) -> Image.Image:
    """Open and decode a picture.

    Args:
        source: a path, or a stream of a file's contents.
        what: the picture's name in errors; None takes the path.

    Raises:
        MaskError: there is no such file, it has another format, is too large, or can't be decoded.
    """
    path = str(source) if what is None else what
    with decodable(path, "a mask", MaskError), Image.open(source, formats=FORMATS) as image:
        return decoded(image, path)


def decoded(image: Image.Image, what: str) -> Image.Image:
    """Decode an image's pixels, and rotate it as its EXIF orientation says.

    Raises:
        MaskError: the image has no pixels or too many, or they can't be decoded.
    """
    check_pixels((image.height, image.width), what)
    with decodable(what, "a mask", MaskError):
        image.load()
        if image.getexif().get(ORIENTATION, 1) != 1:
            return ImageOps.exif_transpose(image)
    return image


def check_pixels(shape: tuple[int, ...], what: str) -> None:
    """Refuse a picture that is empty or too large to be a mask, before it is processed.

    Args:
        shape: height and width; further dimensions are ignored.
        what: the name of the picture, for error messages.

    Raises:
        MaskError: it has no pixels, or more than `MAX_PIXELS`.
    """
    height, width = shape[:2]
    if 0 in (height, width):
        raise MaskError(f"{what}: a picture of {width} x {height} pixels holds no mask")
    if height * width > MAX_PIXELS:
        raise MaskError(f"{what}: a mask can have at most {MAX_PIXELS:,} pixels, got {width} x {height}")


def transparent(image: Image.Image, what: str) -> NDArray[np.bool_] | None:
    """Where a picture's alpha is 0, [H, W], or None if nowhere. Such pixels are background, whatever their colour."""
    if image.mode in ("RGBa", "La"):  # colours multiplied by alpha
        image = image.convert(image.mode.upper())
    if image.mode not in ALPHA_MODES and not (
        image.mode in ("P", "L", "RGB") and image.info.get("transparency") is not None
    ):
        return None
    try:
        whole = image if "A" in image.mode else image.convert("RGBA")
        hidden: NDArray[np.bool_] = np.asarray(whole.getchannel("A")) == 0
    except Exception as error:  # Pillow can raise nearly any error when the transparency is malformed
        raise MaskError(f"{what}: can't be read: {one_line(error)}") from None
    return warn_if_all_hidden(hidden, what)


def warn_if_all_hidden(hidden: NDArray[np.bool_], what: str) -> NDArray[np.bool_] | None:
    """Return ``hidden``, or None if no pixel is hidden; warn if every pixel is."""
    if not hidden.any():
        return None
    if hidden.all():
        warnings.warn(f"{what}: every pixel is transparent, so all of it is background", stacklevel=2)
    return hidden


def array_from(data: bytes, what: str) -> NDArray[Any]:
    """Read the array from the contents of a ``.npy`` file, and allocate no more than they hold.

    Raises:
        MaskError: the contents are damaged, hold Python objects, or the array is too large.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(stream)
        if dtype.hasobject:
            raise ValueError("it holds Python objects, which are not read")
        held, needed = len(data) - stream.tell(), math.prod(shape) * dtype.itemsize
        if held != needed:
            raise ValueError(f"an array of shape {list(shape)} takes {needed} bytes, and {held} are there")
        if math.prod(shape) > MOST_VALUES:
            raise ValueError(f"a mask can have at most {MAX_PIXELS:,} pixels, got an array of shape {list(shape)}")
        return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran else "C")
    except Exception as error:  # a damaged header can raise nearly any error
        raise MaskError(f"{what}: can't be read: {one_line(error)}") from None


def load_array(path: Path) -> NDArray[Any]:
    """Read the array in a ``.npy`` file. Pickled objects are refused.

    Raises:
        MaskError: the file can't be read, or holds too many values.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise MaskError(f"{path}: no such file") from None
    except Exception as error:
        raise MaskError(f"{path}: can't be read: {one_line(error)}") from None
    if not isinstance(array, np.ndarray):
        raise MaskError(f"{path}: must hold one array")
    if array.size > MOST_VALUES:  # an array may hold a plane for every class
        raise MaskError(f"{path}: a mask can have at most {MAX_PIXELS:,} pixels, got an array of {list(array.shape)}")
    return np.array(array)


def one_line(error: object) -> str:
    """A message on one line, of printable characters, cut where it is long."""
    return printable(str(error)[:400] or type(error).__name__)[:200]
