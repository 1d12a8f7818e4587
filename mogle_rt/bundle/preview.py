"""What a command asks of a bundle before PyTorch is loaded: a few facts from its header, unchecked.

`mogle_rt.bundle.bundle.Bundle` checks all of the header; it is opened before anything is drawn.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from mogle_rt.bundle.shipped import bundle_path
from mogle_rt.errors import CheckpointError

MOST_BYTES = 100 << 20  # of a header


@dataclass(frozen=True)
class Preview:
    """Facts of a bundle.

    Attributes:
        content_hash: of all that is in it.
        prompts: which prompts it can encode: "all", "empty" alone, or "none".
    """

    content_hash: str
    prompts: str


def preview(checkpoint: str | Path) -> Preview | None:
    """The facts of a bundle; None of a file that is none, which opening it explains.

    Raises:
        CheckpointError: there is no such file.
    """
    path = bundle_path(checkpoint)
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, MOST_BYTES)))
        metadata = header["__metadata__"]
        texts = any(name.startswith("text_encoder_2.") for name in header)
        empty = any(name.startswith("empty_prompt.") for name in header)
        return Preview(str(metadata["sha256"]), "all" if texts else "empty" if empty else "none")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: no such file") from None
    except (struct.error, ValueError, TypeError, KeyError, RecursionError, IsADirectoryError):
        return None
