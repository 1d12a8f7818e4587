"""Keeps the messages of Ray's own processes and threads away from the user's terminal."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

# As Ray's C++ part writes them: [2026-11-30 23:19:29,302 E 23432 23432] core_worker.cc:2465: …
_OF_RAY = re.compile(rb"\[[\d-]+ [\d:,]+ [A-Z] \d+ \d+\] \S+\.cc:\d+: ")


@contextlib.contextmanager
def without_rays_messages() -> Iterator[None]:
    """Within this context, Ray's own threads don't print, and the messages of its C++ part don't reach the terminal.

    What else is printed passes, as does what the program's other libraries write to file descriptor 2.
    """
    with contextlib.redirect_stdout(_WithoutThreads(sys.stdout)), _standard_error_filtered():
        yield


class _WithoutThreads(io.TextIOBase):
    """Standard output without what Ray's own threads print: many lines whenever one of its processes ends."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if threading.current_thread().name.startswith("ray_"):
            return len(text)
        written: int = self._stream.write(text)
        return written

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return not self._stream.closed and bool(self._stream.isatty())  # Ray asks once more when the program ends

    def fileno(self) -> int:
        number: int = self._stream.fileno()
        return number


@contextlib.contextmanager
def _standard_error_filtered() -> Iterator[None]:
    """File descriptor 2 goes through a thread that leaves Ray's lines out; Python's own stream goes past it."""
    try:
        real = os.dup(2)
    except OSError:  # closed, as for a program without a terminal
        yield
        return
    reading, writing = os.pipe()
    thread = threading.Thread(target=_pass_on, args=(reading, real), name="standard error", daemon=True)
    ours = sys.stderr
    with os.fdopen(real, "w", encoding="utf-8", errors="backslashreplace", buffering=1) as past:
        if _descriptor(ours) == 2:
            ours.flush()
            sys.stderr = past
        os.dup2(writing, 2)
        os.close(writing)
        thread.start()
        try:
            yield
        finally:
            sys.stderr = ours
            os.dup2(real, 2)  # which closes the pipe's end, unless a process that Ray started holds it still
            thread.join(timeout=1)


def _descriptor(stream: Any) -> int | None:
    try:
        number: int = stream.fileno()
    except (AttributeError, OSError, ValueError):  # a stream of a notebook, or of a test
        return None
    return number


def _pass_on(reading: int, real: int) -> None:
    with os.fdopen(reading, "rb") as lines, contextlib.suppress(OSError):
        for line in lines:
            if not _OF_RAY.match(line):
                os.write(real, line)
