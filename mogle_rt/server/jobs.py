"""Jobs, which are requests for images, and the queue in which these images wait to be drawn in batches of one shape."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from mogle_rt.edits.start import StartImage
from mogle_rt.jobs.settings_read import mask_text
from mogle_rt.masks.classes import Labels
from mogle_rt.server.refusals import Refusal, shutting_down


class Shape(NamedTuple):
    """What the images of one batch have in common.

    Attributes:
        strength: of edits; None where nothing is edited. keeps: whether parts of the images are kept.
    """

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    condition_scale: float
    strength: float | None = None
    keeps: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Those of the pipeline's call."""
        return {name: value for name, value in self._asdict().items() if name not in ("strength", "keeps")}


class Queued(NamedTuple):
    """So many images are ahead of the job's first one."""

    ahead: int


class Step(NamedTuple):
    """Image ``image`` of the job has done ``step`` of ``steps`` steps."""

    image: int
    step: int
    steps: int


class Preview(NamedTuple):
    """What image ``image`` looks like so far: the contents of a JPEG file."""

    image: int
    number: int
    data: bytes


class Drawn(NamedTuple):
    """Image ``image`` is drawn: the contents of its file."""

    image: int
    data: bytes


class Failed(NamedTuple):
    """The job has ended without its images."""

    refusal: Refusal


Event = Queued | Step | Preview | Drawn | Failed


class Job:
    """A request for images. Threads that draw tell it what happens; the request's own task reads that.

    Args:
        prompt, labels, shape: of all its images; the labels [H, W] have the size of the images.
        start: the image that an edit starts from.
        seed: of the first image; each next one has the next.
        count: how many images.
        kind: "png" or "jpeg".
        watched: whether the client gets an event for each step. previews: the most previews of each image.
        warnings: what the person should know about the result.
    """

    def __init__(
        self,
        *,
        prompt: str,
        labels: Labels,
        shape: Shape,
        seed: int,
        start: StartImage | None = None,
        count: int = 1,
        kind: str = "png",
        watched: bool = False,
        previews: int = 0,
        warnings: list[str] | None = None,
    ) -> None:
        self.id = f"job_{secrets.token_hex(12)}"
        self.prompt, self.labels, self.shape, self.start, self.kind = prompt, labels, shape, start, kind
        self.seed, self.count, self.watched, self.previews = seed, count, watched, previews
        self.warnings = warnings or []
        self.draws = [Draw(self, index) for index in range(count)]
        self.created = time.time()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._ended = threading.Event()

    @cached_property
    def mask_text(self) -> str | None:
        """The mask, to be written into each image."""
        return mask_text(self.labels)

    @cached_property
    def steps(self) -> int:
        """How many steps each of its images takes."""
        steps = self.shape.num_inference_steps
        if self.start is None:
            return steps
        return steps - self.start.first_step(steps, 1, self.shape.height, self.shape.width)

    @property
    def ended(self) -> bool:
        """Whether nobody waits for its images any more: it failed, or was cancelled."""
        return self._ended.is_set()

    def tell(self, event: Event) -> None:
        """Note what happened. Any thread may call this."""
        if isinstance(event, Failed):
            if self._ended.is_set():
                return
            self._ended.set()
        with suppress(RuntimeError):  # the loop is closed: nobody reads it
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def cancel(self) -> None:
        """End the job. What waits is not drawn; a batch stops after its step if nobody else wants it."""
        self.tell(Failed(Refusal(409, "the job was cancelled", code="cancelled")))

    async def next_event(self) -> Event:
        """Wait for the next event. After `Failed`, or as many `Drawn` as the job has images, there is none."""
        return await self._events.get()


@dataclass(eq=False)
class Draw:
    """One image of a job."""

    job: Job
    index: int

    @property
    def seed(self) -> int:
        return self.job.seed + self.index

    def tell_step(self, step: int) -> None:
        """Tell a job that is watched how far this image is."""
        if self.job.watched and not self.job.ended:
            self.job.tell(Step(self.index, step, self.job.steps))


class Waiting:
    """A queue between requests and the threads that draw. All methods may be called from any thread.

    Args:
        places: the most images that wait. Those that are being drawn have left the queue.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self._draws: list[Draw] = []
        self._closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._draws)

    def put(self, job: Job) -> None:
        """Let all images of a job wait, or none of them.

        Raises:
            Refusal: there are too few places, or the server is to stop.
        """
        with self._changed:
            if self._closed:
                raise shutting_down()
            if job.count > self.places:
                message = f"n can be at most {self.places} on this server, as many as can wait, got {job.count}"
                raise Refusal(422, message, code="too_many_images", param="n")
            if len(self._draws) + job.count > self.places:
                message = f"{len(self._draws)} images wait already, and {self.places} can; ask again in a few seconds"
                raise Refusal(429, message, code="queue_full", headers={"Retry-After": "2"})
            job.tell(Queued(len(self._draws)))
            self._draws.extend(job.draws)
            self._changed.notify()

    def take(self, most: int) -> list[Draw]:
        """Wait for images, and take the oldest with others of its shape, in their order. Empty once the queue is closed.

        Args:
            most: the largest number of images that are drawn at once.
        """
        with self._changed:
            while True:
                self._draws = [draw for draw in self._draws if not draw.job.ended]
                if self._draws:
                    break
                if self._closed:
                    return []
                self._changed.wait()
            shape = self._draws[0].job.shape
            batch = [draw for draw in self._draws if draw.job.shape == shape][:most]
            taken = set(map(id, batch))
            self._draws = [draw for draw in self._draws if id(draw) not in taken]
            self._tell_places()
            return batch

    def forget(self, job: Job) -> None:
        """Free the places of a job that has ended."""
        with self._changed:
            self._draws = [draw for draw in self._draws if draw.job is not job]
            self._tell_places()

    def close(self) -> None:
        """Refuse what waits and whatever comes."""
        with self._changed:
            self._closed = True
            left, self._draws = self._draws, []
            for draw in left:
                draw.job.tell(Failed(shutting_down()))
            self._changed.notify_all()

    def _tell_places(self) -> None:
        for ahead, draw in enumerate(self._draws):
            if draw.job.watched and draw.index == 0:
                draw.job.tell(Queued(ahead))
