"""The threads that draw what waits, each with a pipeline of its own."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mogle_rt.config import PATCH
from mogle_rt.edits.start import StartImage
from mogle_rt.errors import InputError, InsufficientMemoryError, MogleError
from mogle_rt.jobs.image_files import MASK, encode_image, settings_of
from mogle_rt.memory.threads import suitable_threads, threads_are_chosen, worthwhile_threads
from mogle_rt.pipeline import Pipeline
from mogle_rt.server.jobs import Draw, Drawn, Failed, Job, Waiting
from mogle_rt.server.metrics import Metrics
from mogle_rt.server.previews import Previews
from mogle_rt.server.refusals import Refusal, shutting_down

logger = logging.getLogger("mogle_rt.server")

MOST_SIDE_BY_SIDE = 8
SMALL = 256 << 20  # bytes of a bundle that may be held several times


def tokens_of(pipe: Pipeline, height: int, width: int) -> int:
    """The rows of a step's products for one image: image, condition and text."""
    return 2 * (height // PATCH) * (width // PATCH) + pipe.bundle.default_text_tokens


def pipelines(open_pipeline: Callable[[], Pipeline], count: int | None = None) -> list[Pipeline]:
    """Open the pipelines that draw side by side.

    By default there are several only on a CPU, where one image of a small model is drawn by fewer threads than there are
    cores, so that the other cores are free for other images. On a GPU images are drawn in batches.

    Args:
        open_pipeline: makes one.
        count: how many; None chooses.
    """
    first = open_pipeline()
    if count is None:
        side, most = first.bundle.default_size, torch.get_num_threads()
        small = first.bundle.path.stat().st_size <= SMALL
        several = first.device.type == "cpu" and small and not threads_are_chosen()
        threads = worthwhile_threads(tokens_of(first, side, side), first.bundle.config.transformer.width, most)
        count = min(MOST_SIDE_BY_SIDE, most // threads) if several else 1
    every = [first, *(open_pipeline() for _ in range(count - 1))]
    for pipe in every:
        pipe.set_progress_bar_config(disable=True)
    return every


class Cores:
    """Lends processor cores to the pipelines, so that all together use no more threads than there are cores.

    The number of threads of an image follows from its shape alone: it changes the rounding, and an image must not depend
    on what else is drawn at that time.

    Args:
        count: how many there are.
    """

    def __init__(self, count: int) -> None:
        self.count = self._free = count
        self._turn, self._changed = threading.Lock(), threading.Condition()

    @contextmanager
    def lent(self, count: int) -> Iterator[None]:
        """Wait for so many cores, or for all of them if there are fewer, and give them back afterwards."""
        count = min(count, self.count)
        with self._turn, self._changed:  # whoever waits for many is not overtaken by those who need few
            self._changed.wait_for(lambda: self._free >= count)
            self._free -= count
        try:
            yield
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()


class Studio:
    """Draws what jobs ask for.

    Args:
        pipes: pipelines of one bundle; each gets a thread.
        places: the most images that wait.
        max_batch: the most images that one pipeline draws at once. None takes 8 on a GPU. On a CPU it takes 1: batches
            are hardly faster there, and so each image is, to the last bit, the one of a call for it with as many threads.
    """

    def __init__(self, pipes: Sequence[Pipeline], *, places: int = 32, max_batch: int | None = None) -> None:
        self.pipe = pipes[0]
        self.max_batch = max_batch or (1 if self.pipe.device.type == "cpu" else 8)
        self.waiting = Waiting(places)
        self.metrics = Metrics(lambda: len(self.waiting))
        self._stop_now = threading.Event()
        self._most_threads = torch.get_num_threads()
        self._cores = Cores(self._most_threads * (len(pipes) if threads_are_chosen() else 1))
        self._threads = [
            threading.Thread(target=self._work, args=(pipe,), name=f"drawing {i}", daemon=True)
            for i, pipe in enumerate(pipes)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        """Whether all threads are there to draw."""
        return all(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Refuse what waits and whatever comes. What is being drawn goes on."""
        self.waiting.close()

    def join(self, seconds: float) -> bool:
        """Wait until everything is drawn, for so long; what isn't done then is refused after its current step.

        Returns:
            Whether everything was drawn.
        """
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        done = not any(thread.is_alive() for thread in self._threads)
        self._stop_now.set()
        return done

    def cancel(self, job: Job) -> None:
        """End a job and free its places."""
        self.metrics.cancelled.inc()
        job.cancel()
        self.waiting.forget(job)

    def _work(self, pipe: Pipeline) -> None:
        torch.set_num_threads(self._most_threads)  # otherwise it would be what another thread has set for itself
        while batch := self.waiting.take(self.max_batch):
            self.metrics.drawing.inc(len(batch))
            try:
                self._draw(pipe, batch)
            finally:
                self.metrics.drawing.dec(len(batch))

    def _draw(self, pipe: Pipeline, batch: list[Draw]) -> None:
        """Draw a batch. If that fails, each image is drawn alone, so that one can't spoil the others."""
        start = time.monotonic()
        try:
            images = self._call(pipe, batch)
        except Exception as error:
            if len(batch) > 1:
                for draw in batch:
                    self._draw(pipe, [draw])
                return
            batch[0].job.tell(Failed(_refusal_of(error)))
            return
        self.metrics.batches.observe(len(batch))
        self.metrics.batch_seconds.observe(time.monotonic() - start)
        for draw, image in zip(batch, images, strict=True):
            job, shape = draw.job, draw.job.shape
            if self._stop_now.is_set():
                job.tell(Failed(shutting_down()))
            if job.ended:
                continue
            settings = settings_of(
                pipe,
                image.size,
                prompt=job.prompt,
                seed=draw.seed,
                mask=None,
                num_inference_steps=shape.num_inference_steps,
                guidance_scale=shape.guidance_scale,
                condition_scale=shape.condition_scale,
            )
            settings[MASK] = job.mask_text
            if shape.strength is not None:
                settings |= {"edited": "an image that was sent", "strength": shape.strength}
            try:
                job.tell(Drawn(draw.index, encode_image(image, job.kind.upper(), settings)))
                self.metrics.images.inc()
            except MogleError as error:
                job.tell(Failed(_refusal_of(error)))

    def _call(self, pipe: Pipeline, batch: list[Draw]) -> Any:
        shape, starts = batch[0].job.shape, [draw.job.start for draw in batch if draw.job.start is not None]
        previews = Previews(pipe, batch) if any(draw.job.previews for draw in batch) else None

        def on_step(pipe: Pipeline, k: int, timestep: Tensor, tensors: dict[str, Any]) -> None:
            if self._stop_now.is_set() or all(draw.job.ended for draw in batch):
                pipe.interrupt = True
                return
            for draw in batch:
                draw.tell_step(k + 1)
            if previews is not None:
                previews.step(k, tensors["latents"])

        rows = len(batch) * tokens_of(pipe, shape.height, shape.width)
        with suitable_threads(rows, pipe.bundle.config.transformer.width, pipe.device):
            threads = torch.get_num_threads() if pipe.device.type == "cpu" else 0
            with self._cores.lent(threads):
                return pipe(
                    [draw.job.labels for draw in batch],
                    [draw.job.prompt for draw in batch],
                    seed=[draw.seed for draw in batch],
                    callback_on_step_end=on_step,
                    start=StartImage.joined(starts) if starts else None,
                    **shape.options,
                ).images


def _refusal_of(error: Exception) -> Refusal:
    """The message that a client gets for an error while drawing. The log gets only its place, as it may quote a prompt."""
    if isinstance(error, InputError):
        return Refusal(422, str(error), code="invalid_value")
    if isinstance(error, InsufficientMemoryError):
        return Refusal(503, str(error), code="out_of_memory")
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if out_of_memory or "DefaultCPUAllocator" in str(error):
        return Refusal(503, "not enough memory for this image; ask for a smaller one", code="out_of_memory")
    place = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s while drawing:\n%s", type(error).__name__, place)
    return Refusal(
        500, "the image can't be drawn: an error on the server, which its log tells of", code="drawing_failed"
    )
