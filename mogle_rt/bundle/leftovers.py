"""What a killed process leaves behind is removed by the next one, or finished.

New files are written under names that end in ``.part``. Whoever writes one holds a lock on it, which the system releases
when the process ends, however it ends. So what can be locked by another process is left over.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: leftovers stay there, as a lock can't tell them from what is being written
    fcntl = None  # type: ignore[assignment]

PART_FILE = re.compile(r"\.[0-9a-f]{16}\.part")  # as `atomic_write` names them
PART_FOLDER = re.compile(r"\.\w{8}\.part")  # as `replace_together` does
COMPLETE, OLD, GONE = "complete", "old", "gone"  # a file and two folders in such a folder, see `finish`


def hold(descriptor: int, path: Path) -> bool:
    """Lock what one has just made, until the descriptor is closed.

    Returns:
        Whether it is still there: a process that swept at this moment may have removed it before it was locked.
    """
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks: nobody can sweep there either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _abandoned(path: Path) -> Iterator[bool]:
    """Whether nobody writes it; meanwhile nobody else can begin to sweep it."""
    if fcntl is None:
        yield False
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError:  # locked, or not to be locked here
            free = False
        yield free
    finally:
        os.close(descriptor)


@cache
def sweep_once(folder: Path) -> None:
    """See `sweep`; once in a process for each folder, as one can hold thousands of images."""
    sweep(folder)


def sweep(folder: Path) -> None:
    """Remove from a folder what killed processes left there. A replacement that was interrupted is finished.

    What can't be removed, because it belongs to somebody else or lies in a read-only place, stays.
    """
    with suppress(OSError):
        found = [entry.name for entry in os.scandir(folder) if entry.name.endswith(".part")]
        for name in found:
            path = folder / name
            with suppress(OSError):
                if PART_FILE.fullmatch(name) and path.is_file():
                    with _abandoned(path) as free:
                        if free:
                            path.unlink()
                elif PART_FOLDER.fullmatch(name) and path.is_dir() and not path.is_symlink():
                    with _abandoned(path) as free:
                        if free:
                            if (path / COMPLETE).exists():
                                finish(path, folder)
                            shutil.rmtree(path)


def new_names(part: Path, last: str) -> list[str]:
    """Names of the files in a folder of new files, in the order in which they take their places."""
    names = (entry.name for entry in part.iterdir() if entry.name not in (COMPLETE, OLD, GONE))
    return sorted(names, key=lambda name: (name == last, name))


def finish(part: Path, folder: Path) -> None:
    """Finish a replacement that was interrupted after all its files were complete (the file `COMPLETE` says so).

    Those that are still in ``part`` take their names in ``folder``, the one that `COMPLETE` names last; those that the
    folder `GONE` has the names of are removed. Doing it again, or from any point on, gives the same.
    """
    for name in new_names(part, (part / COMPLETE).read_text()):
        (part / name).replace(folder / name)
    if (part / GONE).is_dir():
        for entry in (part / GONE).iterdir():
            (folder / entry.name).unlink(missing_ok=True)
