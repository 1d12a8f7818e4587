"""The files that come with the package: a small checkpoint that draws faces, and example masks with prompts."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from mogle_rt.errors import CheckpointError, InputError, OutputError

NAME = "demo"  # every place that takes a checkpoint's path also takes this name
DATA = Path(__file__).parents[1] / "data"
BUNDLE = DATA / "demo.safetensors"
EXAMPLES = DATA / "examples"


def bundle_path(checkpoint: str | Path) -> Path:
    """The path of a checkpoint. ``demo`` means the checkpoint in the package; anything else is a path already.

    Raises:
        CheckpointError: ``checkpoint`` is neither a text nor a path.
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
    """The examples in the package, sorted by name."""
    prompts: dict[str, str] = json.loads((EXAMPLES / "prompts.json").read_text(encoding="utf-8"))
    return [Example(name, EXAMPLES / f"{name}.png", prompt) for name, prompt in sorted(prompts.items())]


def write_examples(folder: Path) -> list[Path]:
    """Copy the example masks into a folder, each with its prompt beside it in a text file.

    Returns:
        The paths of the files, in the order of `examples`.

    Raises:
        InputError: one of the files exists already.
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
