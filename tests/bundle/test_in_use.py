"""A bundle whose file is written to while it is in use gives an error, not other images."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mogle_rt import CheckpointError
from mogle_rt.bundle.bundle import Bundle

pytestmark = pytest.mark.quick


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"x")
    os.utime(path, ns=(0, 0))  # where the clock is coarse, the time of the change could be the old one


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (overwrite, "was changed while it was in use .its time is another.; open it again"),
        (append, "was changed while it was in use .it had [0-9,]+ bytes and has"),
        (lambda path: os.truncate(path, 5000), "bytes and has 5,000.; open it again"),
    ],
)
def test_changed_in_place(change: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    shutil.copy(Bundle("demo").path, path)
    bundle = Bundle(path)
    bundle.check_unchanged()
    change(path)
    with pytest.raises(CheckpointError, match=message):
        bundle.check_unchanged()


def test_a_new_file_of_the_same_name_is_no_change(tmp_path: Path) -> None:
    """The opened file stays as it was, so a bundle can be replaced while a program uses it."""
    path = tmp_path / "b.safetensors"
    shutil.copy(Bundle("demo").path, path)
    bundle = Bundle(path)
    shutil.copy(path, tmp_path / "new")
    (tmp_path / "new").replace(path)
    path.unlink()
    bundle.check_unchanged()
