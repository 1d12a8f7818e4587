"""What a client reads of its job: a stream of events, or one answer when all images are drawn."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from mogle_rt.server.drawing import Studio
from mogle_rt.server.jobs import Drawn, Event, Failed, Job, Preview, Queued, Step
from mogle_rt.server.refusals import Refusal

KEEP_ALIVE = 10.0  # seconds after which a stream without events says that it is alive


class Answers:
    """Follows jobs for their clients. A client that leaves ends its job.

    Args:
        studio: draws the jobs.

    Attributes:
        jobs: those that are being followed, by their ids.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.jobs: dict[str, Job] = {}

    async def to(self, job: Job, request: Request, stream: bool) -> Response:
        """The answer to a request whose job waits or is being drawn.

        Raises:
            Refusal: the job failed, or was cancelled.
        """
        if stream:
            headers = {"X-Accel-Buffering": "no"}
            return StreamingResponse(self._stream(job), media_type="text/event-stream", headers=headers)
        reading = asyncio.ensure_future(self._images(job))
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({reading, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                return Response(status_code=499)  # nobody reads it
            images = reading.result()
        finally:
            for task in (reading, gone):
                task.cancel()
                with suppress(asyncio.CancelledError, Refusal):
                    await task
        data = [{"b64_json": as_text(image), "seed": job.seed + i} for i, image in enumerate(images)]
        answer: dict[str, Any] = {"created": int(job.created), "data": data, "output_format": job.kind}
        answer |= {"size": f"{job.shape.width}x{job.shape.height}", "background": "opaque"}
        if job.warnings:
            answer["warnings"] = job.warnings
        return JSONResponse(answer)

    async def _events(self, job: Job) -> AsyncIterator[Event | None]:
        """All events of a job, and None now and then while there are none. Whoever stops reading ends the job."""
        self.jobs[job.id] = job
        left = job.count
        try:
            while left:
                try:
                    event = await asyncio.wait_for(job.next_event(), KEEP_ALIVE)
                except TimeoutError:
                    yield None
                    continue
                if isinstance(event, Failed):
                    left = 0
                elif isinstance(event, Drawn):
                    left -= 1
                yield event
        finally:
            del self.jobs[job.id]
            if left:
                self.studio.cancel(job)

    async def _stream(self, job: Job) -> AsyncIterator[bytes]:
        events = self._events(job)
        try:
            async for event in events:
                if event is None:
                    yield b": waiting\n\n"
                    continue
                data = as_data(event, job)
                yield f"event: {data['type']}\ndata: {json.dumps(data)}\n\n".encode()
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    async def _images(self, job: Job) -> list[bytes]:
        images: dict[int, bytes] = {}
        events = self._events(job)
        try:
            async for event in events:
                if isinstance(event, Failed):
                    raise event.refusal
                if isinstance(event, Drawn):
                    images[event.image] = event.data
        finally:
            await events.aclose()  # type: ignore[attr-defined]
        return [images[i] for i in range(job.count)]


def as_data(event: Event, job: Job) -> dict[str, Any]:
    """An event of a stream as JSON has it, with the names of OpenAI's events where these have one."""
    if isinstance(event, Failed):
        return {"type": "error", "job": job.id} | event.refusal.body()
    kind = "image_generation" if job.start is None else "image_edit"
    if isinstance(event, Queued):
        return {"type": f"{kind}.queued", "job": job.id, "ahead": event.ahead}
    if isinstance(event, Step):
        progress = {"type": f"{kind}.progress", "job": job.id, "index": event.image}
        return progress | {"step": event.step, "steps": event.steps}
    common = {
        "job": job.id,
        "index": event.image,
        "b64_json": as_text(event.data),
        "created_at": int(job.created),
        "size": f"{job.shape.width}x{job.shape.height}",
        "quality": "auto",
        "background": "opaque",
    }
    if isinstance(event, Preview):
        partial = {"type": f"{kind}.partial_image", "partial_image_index": event.number}
        return partial | {"output_format": "jpeg"} | common
    completed = {"type": f"{kind}.completed", "output_format": job.kind, "seed": job.seed + event.image}
    return completed | common | {"warnings": job.warnings}


def as_text(data: bytes) -> str:
    """A file's contents in base64."""
    return base64.b64encode(data).decode()


async def _gone(request: Request) -> None:
    """Wait until the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
