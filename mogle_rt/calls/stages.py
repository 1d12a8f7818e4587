"""The stages of a call: shown on a progress bar, and timed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from tqdm import tqdm


@contextmanager
def progress_bar(steps: int, config: Mapping[str, Any]) -> Iterator[tqdm[NoReturn]]:
    """A tqdm bar that counts denoising steps. Unless ``config`` says otherwise, it shows on a terminal only."""
    with tqdm(**{"total": steps, "disable": None} | dict(config)) as bar:
        try:
            yield bar
        except BaseException:
            bar.leave = False  # an error's message says more
            raise


class Stages:
    """Shows the current stage as a bar's description, and measures how long each takes.

    Args:
        bar: what shows the stage.
        device: where the work is done. A GPU is waited for, so that its time counts where it was spent.
        seconds: where the wall-clock time of each stage is written.
        described: whether the bar has a description of its own, which then stays.
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
