"""Who may call a pipeline: one thread at a time, and only in the process that made it."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from mogle_rt.errors import InputError
from mogle_rt.torch_api.settings import settled

P = ParamSpec("P")
R = TypeVar("R")


class Turns:
    """The lock of a pipeline, and the process that it belongs to."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.running = False
        self.process = os.getpid()

    def check_process(self) -> None:
        """A process that was forked has this pipeline's memory, but not the threads that compute for it.

        Raises:
            InputError: this is another process than the one that made the pipeline. Without this check the call would
                wait forever for threads that don't exist, or fail deep inside CUDA.
        """
        if os.getpid() != self.process:
            raise InputError(
                f"this pipeline was made in process {self.process} and can't be called in its fork {os.getpid()}; start "
                "processes with multiprocessing's method 'spawn', which opens the pipeline anew in each of them"
            )


class _Caller(Protocol):
    _turns: Turns
    _allow_tf32: bool


C = TypeVar("C", bound=_Caller)


def one_at_a_time(call: Callable[Concatenate[C, P], R]) -> Callable[Concatenate[C, P], R]:
    """Calls from several threads wait for each other: a call's state is in the engine's buffers."""

    @functools.wraps(call)
    def alone(self: C, /, *args: P.args, **kwargs: P.kwargs) -> R:
        turns = self._turns
        turns.check_process()
        with turns.lock:
            if turns.running:  # the same thread: others wait
                raise InputError("a pipeline can't be called from within its own call; make another Pipeline for that")
            turns.running = True
            try:
                with settled(allow_tf32=self._allow_tf32):
                    return call(self, *args, **kwargs)
            finally:
                turns.running = False

    return alone
