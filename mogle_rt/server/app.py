"""The application: its routes, and how a request for images is answered."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from importlib.resources import files as package_files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mogle_rt import __version__
from mogle_rt.arguments import warn_of_guidance
from mogle_rt.bundle.shipped import examples
from mogle_rt.masks.classes import CLASS_NAMES, PALETTE, Labels
from mogle_rt.masks.orders import ORDERS
from mogle_rt.server.access import Guard
from mogle_rt.server.drawing import Studio
from mogle_rt.server.jobs import Drawn, Event, Failed, Job, Shape, as_data
from mogle_rt.server.refusals import Refusal
from mogle_rt.server.requests import GenerationRequest, Limits, check_pixels
from mogle_rt.server.uploads import fitted, noted_warnings, read_form, read_masks, read_request

SEEDS = 1_000_000  # a random seed is below this, so that it can be read out and typed again
KEEP_ALIVE = 10.0  # seconds after which a stream without events says that it is alive
PAGE = {"/": "index.html", "/page.js": "page.js", "/style.css": "style.css", "/icon.svg": "icon.svg"}
KINDS = {"html": "text/html; charset=utf-8", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}


def build_app(studio: Studio, model: str, *, keys: list[bytes] | None = None, limits: Limits | None = None) -> FastAPI:
    """The application of a server.

    Args:
        studio: draws; its threads must have been started.
        model: the model's name in requests and answers.
        keys: of which a request must hold one; none for loopback alone.
        limits: what one request may take.
    """
    limits = limits or Limits()
    # No pages of documentation, which would fetch scripts from elsewhere, and no redirects to what a Host header says.
    app = FastAPI(title="mogle_rt", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Guard, keys=keys or [], metrics=studio.metrics)
    jobs: dict[str, Job] = {}
    bundle = studio.pipe.bundle
    started = int(time.time())

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> Response:
        return JSONResponse(refusal.body(), refusal.status, refusal.headers)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        message = "there is nothing at this address" if error.status_code == 404 else "this address takes other methods"
        if error.status_code not in (404, 405):
            message = "the request can't be answered"
        headers = dict(error.headers or {})
        return JSONResponse(Refusal(error.status_code, message).body(), error.status_code, headers)

    @app.exception_handler(ClientDisconnect)
    async def nobody_listens(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)

    body = {"requestBody": {"content": {"application/json": {"schema": GenerationRequest.model_json_schema()}}}}

    @app.post("/v1/images/generations", openapi_extra=body)
    async def generate(request: Request) -> Response:
        asked, files = await read_request(request, limits)
        asked.check(limits, model)
        job = await _job_of(asked, files)
        studio.waiting.put(job)
        if asked.stream:
            return StreamingResponse(_stream(job), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        return await _answer(job, request)

    @app.delete("/v1/jobs/{job_id}")
    async def cancel(job_id: str) -> dict[str, Any]:
        job = jobs.get(job_id)
        if job is None:
            raise Refusal(404, "there is no such job; it may have ended", code="job_not_found")
        studio.cancel(job)
        return {"id": job.id, "object": "job", "cancelled": True}

    @app.post("/v1/masks")
    async def masks(request: Request) -> dict[str, Any]:
        """Read a mask in any form, for a program that has no reader of its own, such as the page."""
        fields, files = await read_form(request, limits)
        order = fields.pop("mask_order", "celebamask")
        if fields or not files:
            raise Refusal(422, "the form must have a file semantic_mask, and may have mask_order", code="invalid_value")
        if order not in ORDERS:
            raise Refusal(
                422, f"mask_order must be one of {', '.join(ORDERS)}", code="invalid_value", param="mask_order"
            )
        labels, warnings = await asyncio.to_thread(read_masks, files, order, limits)
        height, width = labels.shape
        return {"width": width, "height": height, "labels": _base64(labels.tobytes()), "warnings": warnings}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model()]}

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != model:
            raise Refusal(404, f"there is no such model; this server has {model!r}", code="model_not_found")
        return _model()

    @app.get("/health")
    async def health() -> Response:
        if not studio.alive:
            raise Refusal(503, "a thread that draws has ended; start the server anew", code="not_healthy")
        return JSONResponse({"status": "ok", "waiting": len(studio.waiting)})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(studio.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/settings.json")
    async def settings() -> dict[str, Any]:
        """What the page needs to know."""
        return {
            "model": _model(),
            "classes": [
                {"name": name, "colour": colour} for name, colour in zip(CLASS_NAMES, PALETTE.tolist(), strict=True)
            ],
            "orders": list(ORDERS),
            "examples": [{"name": one.name, "prompt": one.prompt} for one in examples()],
        }

    @app.get("/examples/{name}")
    async def example(name: str) -> Response:
        for one in examples():
            if f"{one.name}.png" == name:
                return Response(one.mask.read_bytes(), media_type="image/png")
        raise Refusal(404, "there is no such example")

    for path, name in PAGE.items():
        _serve_file(app, path, name)

    def _model() -> dict[str, Any]:
        return {
            "id": model,
            "object": "model",
            "created": started,
            "owned_by": "mogle_rt",
            "default_side": bundle.default_size,
            "guidance": bundle.config.transformer.guidance_embeds,
            "prompts": bundle.has_text_encoders,
            "max_pixels": limits.pixels,
            "max_steps": limits.steps,
            "max_upload": limits.upload,
        }

    async def _job_of(asked: GenerationRequest, files: list[Any]) -> Job:
        side, size = bundle.default_size, asked.height_and_width
        warnings: list[str] = []
        if asked.prompt and not bundle.has_text_encoders:
            raise Refusal(422, "this model has no text encoders, so it takes no prompt", param="prompt")
        mask: Labels | None = None
        if files:
            mask, warnings = await asyncio.to_thread(read_masks, files, asked.mask_order, limits)
        labels, further = await asyncio.to_thread(fitted, mask, size, side)
        has_guidance = bundle.config.transformer.guidance_embeds
        of_guidance = await asyncio.to_thread(_told_of_guidance, asked.guidance_scale, has_guidance)
        height, width = labels.shape
        check_pixels(height, width, limits)
        return Job(
            prompt=asked.prompt,
            labels=labels,
            shape=Shape(height, width, asked.num_inference_steps, asked.guidance_scale, asked.condition_scale),
            seed=secrets.randbelow(SEEDS) if asked.seed is None else asked.seed,
            count=asked.n,
            kind=asked.output_format,
            watched=asked.stream,
            previews=asked.partial_images if asked.stream else 0,
            warnings=warnings + further + of_guidance,
        )

    async def _events(job: Job) -> AsyncIterator[Event | None]:
        """All events of a job, and None now and then while there are none. Whoever stops reading ends the job."""
        jobs[job.id] = job
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
            del jobs[job.id]
            if left:
                studio.cancel(job)

    async def _stream(job: Job) -> AsyncIterator[bytes]:
        events = _events(job)
        try:
            async for event in events:
                if event is None:
                    yield b": waiting\n\n"
                    continue
                data = as_data(event, job, _base64)
                yield f"event: {data['type']}\ndata: {json.dumps(data)}\n\n".encode()
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    async def _answer(job: Job, request: Request) -> Response:
        reading = asyncio.ensure_future(_images(job))
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
        data = [{"b64_json": _base64(image), "seed": job.seed + i} for i, image in enumerate(images)]
        answer: dict[str, Any] = {"created": int(job.created), "data": data, "output_format": job.kind}
        answer |= {"size": f"{job.shape.width}x{job.shape.height}", "background": "opaque"}
        if job.warnings:
            answer["warnings"] = job.warnings
        return JSONResponse(answer)

    async def _images(job: Job) -> list[bytes]:
        images: dict[int, bytes] = {}
        events = _events(job)
        try:
            async for event in events:
                if isinstance(event, Failed):
                    raise event.refusal
                if isinstance(event, Drawn):
                    images[event.image] = event.data
        finally:
            await events.aclose()  # type: ignore[attr-defined]
        return [images[i] for i in range(job.count)]

    return app


def _told_of_guidance(scale: float, has_guidance: bool) -> list[str]:
    with noted_warnings() as told:
        warn_of_guidance(scale, has_guidance)
    return told


async def _gone(request: Request) -> None:
    """Wait until the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _serve_file(app: FastAPI, path: str, name: str) -> None:
    """Serve one file of the page. Only files of this list can be asked for, so that no path leads elsewhere."""
    content = package_files("mogle_rt.server").joinpath("page", name).read_bytes()
    kind = KINDS[name.rpartition(".")[2]]

    @app.get(path, include_in_schema=False)
    async def serve() -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})
