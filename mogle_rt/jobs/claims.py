"""Several processes at work in one folder: each image is claimed by one of them.

A claim is a lock on one byte of a file that all processes have open. The system drops it when its process ends, in
whatever way, so that no claim is ever left behind. The byte lies far beyond the file's end, at a place that follows from
the image's name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO

try:
    import fcntl
except ImportError:  # Windows: processes there draw an image twice rather than share the work
    fcntl = None  # type: ignore[assignment]

_CLAIMS = 1 << 30  # the bytes of claims begin here, and are as many
_WHOLE = _CLAIMS - 1  # the byte that stands for the file itself


class Claims:
    """Locks within a file. The file must not be opened a second time in this process: closing it drops all claims.

    Args:
        file: open for writing.
    """

    def __init__(self, file: FileIO) -> None:
        self._file = file

    def claim(self, name: str) -> bool:
        """Take what has this name. False if another process has it; this process may take a name twice."""
        if fcntl is None:
            return True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _place(name))
        except (BlockingIOError, PermissionError):
            return False
        return True

    def release(self, name: str) -> None:
        """Give it back."""
        if fcntl is not None:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _place(name))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within this context no other process reads or writes the file, if it asks in this way, too."""
        if fcntl is not None:
            fcntl.lockf(self._file, fcntl.LOCK_EX, 1, _WHOLE)
        try:
            yield
        finally:
            if fcntl is not None:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _WHOLE)


def _place(name: str) -> int:
    """Two names may share a place, by chance; then the one waits for the other without need."""
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).digest()
    return _CLAIMS + int.from_bytes(digest[:8], "little") % _CLAIMS
