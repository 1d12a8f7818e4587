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

from mogle_rt.bundle.leftovers import COMPLETE, OLD, finish, hold, new_names, sweep, sweep_once
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
            mode = None
        if mode is not None and stat.S_ISDIR(mode):
            raise OutputError(f"{path}: is a folder; a file name is needed")
        if mode is not None and not stat.S_ISREG(mode):
            raise OutputError(f"{path}: is a device or pipe; only ordinary files can be replaced")
        sweep_once(path.parent)
        while True:
            # The temporary name is short, because the name of `path` may already be as long as the system allows.
            temporary = path.with_name(f".{secrets.token_hex(8)}.part")
            file = temporary.open("x+b")
            if hold(file.fileno(), temporary):
                break
            file.close()
    try:
        with _as_output_error(path):
            with file:
                if mode is not None:
                    temporary.chmod(
                        stat.S_IMODE(mode)
                    )  # who may read the old file may read the new one, and nobody else
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

    Either all files are moved and replace those of the same names, or none is. The file named ``last`` is moved last. If
    the process is killed while they are moved, the next `sweep` of ``folder`` moves the rest.

    Names of files that are to be removed from ``folder`` at the same time can be put into the folder `GONE` in it.

    Raises:
        OutputError: a new file has the name of an existing folder, or ``folder`` can't be written to.
    """
    with _as_output_error(folder):
        sweep(folder)
        new, lock = _part_folder(folder)
    old = new / OLD
    settled = True
    try:
        with _as_output_error(new):
            old.mkdir()
        yield new
        names = new_names(new, last)
        had = {name for name in names if (folder / name).exists()}
        for name in names:
            if (folder / name).is_dir():
                raise OutputError(f"{folder / name}: is a folder; a file name is needed")
        settled = False
        try:
            with _as_output_error(new):
                _keep_modes(new, folder, had)
                _write_through(new / COMPLETE, last)
            for name in names:
                with _as_output_error(folder / name):
                    if name in had:
                        _set_aside(folder / name, old / name)
                    (new / name).replace(folder / name)
            with _as_output_error(folder):
                finish(new, folder)
            settled = True
        except BaseException:
            (new / COMPLETE).unlink(missing_ok=True)  # it is undone, not finished
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
        if lock is not None:
            os.close(lock)


def _part_folder(folder: Path) -> tuple[Path, int | None]:
    """A new temporary folder in ``folder``, and the descriptor that locks it as long as it is open."""
    while True:
        new = Path(tempfile.mkdtemp(prefix=".", suffix=".part", dir=folder))
        if os.name == "nt":  # a folder can't be opened there
            return new, None
        lock = os.open(new, os.O_RDONLY)
        if hold(lock, new):
            return new, lock
        os.close(lock)


def _keep_modes(new: Path, folder: Path, had: set[str]) -> None:
    """Who may read the old files may read the new ones. A link to somebody's bundle keeps the bundle's own."""
    for name in had:
        if (new / name).stat().st_nlink == 1:
            (new / name).chmod(stat.S_IMODE((folder / name).stat().st_mode))


def _set_aside(path: Path, aside: Path) -> None:
    """Keep a file under another name, for as long as it may have to come back. Its own name stays taken meanwhile."""
    try:
        os.link(path, aside, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a file system without hard links
        path.rename(aside)


def _write_through(path: Path, text: str) -> None:
    """Write a small file, and wait until it is on the disk."""
    with path.open("x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        file = next((folder for folder in path.parents if folder.is_file()), path.parent)
        raise OutputError(f"{path}: can't be written: {file} is a file, not a folder") from None
    except OSError as error:
        if isinstance(error, MogleError):
            raise
        raise OutputError(f"{path}: can't be written: {error.strerror or error}") from None
