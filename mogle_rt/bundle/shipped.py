"""What comes with the package: a small checkpoint that draws faces, and masks and prompts to try it on."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from mogle_rt.errors import CheckpointError, InputError, OutputError

NAME = "demo"  # in a checkpoint's place, everywhere
DATA = Path(__file__).parents[1] / "data"
BUNDLE = DATA / "demo.safetensors"
EXAMPLES = DATA / "examples"


def bundle_path(checkpoint: str | Path) -> Path:
    """The file of a checkpoint: ``demo`` is the one in the package, all else is a path.

    Raises:
        CheckpointError: it is neither a text nor a path.
    """
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise CheckpointError(f"a checkpoint must be a path, or {NAME!r}, got {checkpoint!r}")
    return BUNDLE if str(checkpoint) == NAME else Path(checkpoint)


@dataclass(frozen=True)
class Example:
    """A mask (palette PNG, 128 x 128) and a prompt that fits it."""

    name: str
    mask: Path
    prompt: str


def examples() -> list[Example]:
    """The examples in the package, by name."""
    prompts: dict[str, str] = json.loads((EXAMPLES / "prompts.json").read_text(encoding="utf-8"))
    return [Example(name, EXAMPLES / f"{name}.png", prompt) for name, prompt in sorted(prompts.items())]


def write_examples(folder: Path) -> list[Path]:
    """Copy the masks into a folder, each with its prompt beside it in a text file.

    Returns:
        The files, in the order of `examples`.

    Raises:
        InputError: a file of that name is there already.
        OutputError: the folder can't be written.
    """
    files = {}
    for example in examples():
        files[folder / f"{example.name}.png"] = example.mask.read_bytes()
        files[folder / f"{example.name}.txt"] = f"{example.prompt}\n".encode()
    existing = [path for path in files if path.exists()]
    if existing:
        raise InputError(f"{existing[0]}: is there already; give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            path.write_bytes(content)
    except OSError as error:
        raise OutputError(f"{folder}: can't be written: {error.strerror}") from None
    return list(files)
