"""Previews: what an image looks like before it is done, estimated from its latents."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

from torch import Tensor

from mogle_rt.config import PATCH
from mogle_rt.edits.start import StartImage
from mogle_rt.errors import MogleError
from mogle_rt.jobs.image_files import encode_image
from mogle_rt.loop.schedule import make_schedule
from mogle_rt.pipeline import Pipeline
from mogle_rt.server.jobs import Draw, Preview

PATIENCE = 4  # a preview is left out until this many times the last one's duration has passed since it
QUALITY = 80  # of the JPEG


class Previews:
    """Makes the previews of one batch. They cost at most about a fifth of the time, and change nothing of the images.

    Args:
        pipe: the pipeline that draws the batch.
        batch: the images.
    """

    def __init__(self, pipe: Pipeline, batch: Sequence[Draw]) -> None:
        shape = batch[0].job.shape
        self._pipe, self._batch, self._shape, self._steps = pipe, batch, shape, batch[0].job.steps
        tokens = shape.height // PATCH * (shape.width // PATCH)
        schedule = make_schedule(pipe.bundle.config.scheduler, shape.num_inference_steps, tokens)
        self._sigmas = schedule.sigmas[shape.num_inference_steps - self._steps :].tolist()  # of the steps that are run
        self._made = dict.fromkeys(batch, 0)
        self._last: Tensor | None = None
        self._not_before = 0.0

    def step(self, k: int, latents: Tensor) -> None:
        """Take the latents [B, N, 64] after step k, and tell the jobs their previews, if some are due."""
        steps, before = self._steps, self._last
        self._last = latents
        due = [
            i
            for i, draw in enumerate(self._batch)
            if not draw.job.ended and (k + 1) * (draw.job.previews + 1) // steps > self._made[draw]
        ]
        # The last step's preview would be the image itself, and the first step has no step before it.
        if before is None or k + 1 >= steps or not due or time.monotonic() < self._not_before:
            return
        start = time.monotonic()
        # The step went from noise level a to b along a velocity, which leads on to an estimate of the image, at level 0.
        a, b = self._sigmas[k], self._sigmas[k + 1]
        estimate = latents.float() + (latents.float() - before.float()) * (b / (a - b))
        with suppress(MogleError):  # an estimate that can't be decoded is no reason to stop
            starts = [start for start in (self._batch[i].job.start for i in due) if start is not None]
            finish = StartImage.joined(starts).finish if starts else None
            height, width = self._shape.height, self._shape.width
            images = self._pipe.decoder(estimate[due].to(latents.dtype), height, width, "pil", finish)
            for i, image in zip(due, images, strict=True):
                draw = self._batch[i]
                self._made[draw] = (k + 1) * (draw.job.previews + 1) // steps
                draw.job.tell(Preview(draw.index, self._made[draw] - 1, encode_image(image, "JPEG", quality=QUALITY)))
        now = time.monotonic()
        self._not_before = now + PATIENCE * (now - start)
