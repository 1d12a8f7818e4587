"""Write files atomically: they appear complete or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mogle_rt.errors import MogleError, OutputError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path`` for writing. It is renamed to ``path`` if the block ends without an error.

    Raises:
        OutputError: ``path`` is a folder, a device or a pipe, its folder can't be written to, or the disk is full.
    """
    with _as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            mode = path.stat().st_mode  # not `exists`, which hides the error of too long a name from Python 3.14 on
        except FileNotFoundError:
            mode = stat.S_IFREG
        if stat.S_ISDIR(mode):
            raise OutputError(f"{path}: is a folder; a file name is needed")
        if not stat.S_ISREG(mode):
            raise OutputError(f"{path}: is a device or pipe; only ordinary files can be replaced")
        # The temporary name is short, because the name of `path` may already be as long as the system allows.
        temporary = path.with_name(f".{secrets.token_hex(8)}.part")
        file = temporary.open("x+b")
    try:
        with _as_output_error(path):
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def replace_together(folder: Path, last: str) -> Iterator[Path]:
    """Yield a temporary folder for new files. They are moved into ``folder`` only if the block ends without error.

    Either all files are moved and replace those of the same names, or none is. The file named ``last`` is moved last.

    Raises:
        OutputError: a new file has the name of an existing folder, or ``folder`` can't be written to.
    """
    with _as_output_error(folder):
        # A random name, so that a folder left behind by a killed process is not in the way.
        new = Path(tempfile.mkdtemp(prefix=".", suffix=".part", dir=folder))
    old = new / "old"
    settled = True
    try:
        with _as_output_error(new):
            old.mkdir()
        yield new
        names = sorted((p.name for p in new.iterdir() if p != old), key=lambda name: (name == last, name))
        had = {name for name in names if (folder / name).exists()}
        for name in names:
            if (folder / name).is_dir():
                raise OutputError(f"{folder / name}: is a folder; a file name is needed")
        settled = False
        try:
            for name in names:
                with _as_output_error(folder / name):
                    if name in had:
                        (folder / name).rename(old / name)
                    (new / name).rename(folder / name)
            settled = True
        except BaseException:
            for name in names:
                if (old / name).exists():
                    (old / name).replace(folder / name)
                elif name not in had:
                    (folder / name).unlink(missing_ok=True)
            settled = True
            raise
    except OutputError as error:
        raise OutputError(str(error).replace(str(new), str(folder))) from None
    finally:
        if settled:  # if not, the folder still holds old files that couldn't be moved back
            shutil.rmtree(new, ignore_errors=True)


@contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise OutputError(f"{path}: can't be written: {path.parent} is a file, not a folder") from None
    except OSError as error:
        if isinstance(error, MogleError):
            raise
        raise OutputError(f"{path}: can't be written: {error.strerror or error}") from None
