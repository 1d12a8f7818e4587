"""Show the stages of a call on a progress bar, and time them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from tqdm import tqdm


@contextmanager
def progress_bar(steps: int, config: Mapping[str, Any]) -> Iterator[tqdm[NoReturn]]:
    """A tqdm bar that counts denoising steps. Unless ``config`` says otherwise, it appears only on a terminal."""
    with tqdm(**{"total": steps, "disable": None} | dict(config)) as bar:
        try:
            yield bar
        except BaseException:
            bar.leave = False  # remove the bar: the error's message says more
            raise


class Stages:
    """Shows the current stage as the progress bar's description, and measures how long each stage takes.

    Args:
        bar: the progress bar.
        device: the device that does the work. Each stage ends by waiting for a GPU, so that its work counts as part of
            the stage that started it.
        seconds: a dict that receives the wall-clock time of each stage.
        described: whether the bar already has its own description, which is then kept.
    """

    def __init__(
        self, bar: tqdm[NoReturn], device: torch.device, seconds: dict[str, float], *, described: bool
    ) -> None:
        self.bar, self.device, self.seconds, self.described = bar, device, seconds, described

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if not self.described:
            self.bar.set_description(name)
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = time.perf_counter() - start
