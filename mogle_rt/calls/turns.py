"""Let only one thread at a time call a pipeline, and only in the process that made it."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from mogle_rt.errors import InputError
from mogle_rt.torch_api.settings import settled


class TakesTurns:
    """A base class whose methods wait for each other if they are marked with `one_at_a_time`.

    Args:
        allow_tf32: see `mogle_rt.torch_api.settings.settled`.
    """

    def __init__(self, *, allow_tf32: bool) -> None:
        self._lock = threading.RLock()
        self._running = False
        self._process = os.getpid()
        self._allow_tf32 = allow_tf32

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until no other thread is inside.

        Raises:
            InputError: a call is made from within a call, or this process is a fork of the one that made the object. A
                fork has a copy of the memory, but not the threads that compute. The call would wait forever for these
                threads, or fail deep inside CUDA.
        """
        if os.getpid() != self._process:
            raise InputError(
                f"this pipeline belongs to process {self._process} and can't be used in its fork {os.getpid()}; start "
                "processes with multiprocessing's method 'spawn', which opens the pipeline anew in each of them"
            )
        with self._lock:
            if self._running:  # this can only be the same thread, because others wait for the lock
                raise InputError("a pipeline can't be called from within its own call; make another Pipeline for that")
            self._running = True
            try:
                with settled(allow_tf32=self._allow_tf32):
                    yield
            finally:
                self._running = False


Method = TypeVar("Method", bound=Callable[..., Any])  # a method of a subclass of `TakesTurns`


def one_at_a_time(call: Method) -> Method:
    """Make calls from several threads wait for each other, because a call keeps its state in the engine's buffers."""

    @functools.wraps(call)
    def alone(self: TakesTurns, /, *args: Any, **kwargs: Any) -> Any:
        with self._turn():
            return call(self, *args, **kwargs)

    return cast(Method, alone)
