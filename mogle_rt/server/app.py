"""The application: its routes, and how a request for images is answered."""

from __future__ import annotations

import asyncio
import secrets
import time
from importlib.resources import files as package_files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mogle_rt import __version__
from mogle_rt.arguments import warn_of_guidance
from mogle_rt.bundle.shipped import examples
from mogle_rt.edits.start import StartImage
from mogle_rt.encoders.words import KnownWords, words_of
from mogle_rt.masks.classes import CLASS_NAMES, PALETTE, Labels
from mogle_rt.masks.orders import ORDERS
from mogle_rt.server.access import Guard
from mogle_rt.server.answers import Answers, as_text
from mogle_rt.server.asked.bodies import Files, read_form, read_request
from mogle_rt.server.asked.edits import read_edit, read_image_settings
from mogle_rt.server.asked.masks import fitted, noted_warnings, read_masks
from mogle_rt.server.asked.requests import EditRequest, GenerationRequest, ImagesRequest, Limits, check_pixels
from mogle_rt.server.drawing import Studio
from mogle_rt.server.jobs import Job, Shape
from mogle_rt.server.refusals import Refusal

SEEDS = 1_000_000  # a random seed is below this, so that it can be read out and typed again
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
    answers = Answers(studio)
    bundle = studio.pipe.bundle
    known = words_of(bundle)
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

    @app.post("/v1/images/generations", openapi_extra=_described(GenerationRequest))
    async def generate(request: Request) -> Response:
        asked, files = await read_request(request, limits, GenerationRequest)
        asked.check(limits, model)
        job = await _generation(asked, files)
        studio.waiting.put(job)
        return await answers.to(job, request, asked.stream)

    @app.post("/v1/images/edits", openapi_extra=_described(EditRequest))
    async def edit(request: Request) -> Response:
        asked, files = await read_request(request, limits, EditRequest)
        asked.check(limits, model)
        job = await _edit(asked, files)
        studio.waiting.put(job)
        return await answers.to(job, request, asked.stream)

    @app.post("/v1/images/settings")
    async def image_settings(request: Request) -> dict[str, Any]:
        """What an image was drawn with, and its mask, as far as it holds them."""
        fields, files = await read_form(request, limits, {"image": "image[]"})
        if fields or not files:
            raise Refusal(422, "the form must have a file image", code="invalid_value", param="image")
        known, labels = await asyncio.to_thread(read_image_settings, files["image"], limits)
        return {
            "prompt": known.prompt,
            "seed": known.seed,
            "num_inference_steps": known.steps,
            "guidance_scale": known.guidance_scale,
            "condition_scale": known.condition_scale,
            "own_model": known.bundle_sha256 in (None, bundle.content_hash),
            "mask": None if labels is None else _mask_data(labels),
        }

    @app.delete("/v1/jobs/{job_id}")
    async def cancel(job_id: str) -> dict[str, Any]:
        job = answers.jobs.get(job_id)
        if job is None:
            raise Refusal(404, "there is no such job; it may have ended", code="job_not_found")
        studio.cancel(job)
        return {"id": job.id, "object": "job", "cancelled": True}

    @app.post("/v1/masks")
    async def masks(request: Request) -> dict[str, Any]:
        """Read a mask in any form, for a program that has no reader of its own, such as the page."""
        fields, files = await read_form(request, limits, GenerationRequest.FILES)
        order = fields.pop("mask_order", "celebamask")
        if fields or not files:
            raise Refusal(422, "the form must have a file semantic_mask, and may have mask_order", code="invalid_value")
        if order not in ORDERS:
            raise Refusal(
                422, f"mask_order must be one of {', '.join(ORDERS)}", code="invalid_value", param="mask_order"
            )
        labels, warnings = await asyncio.to_thread(read_masks, files["semantic_mask"], order, limits)
        return _mask_data(labels) | {"warnings": warnings}

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

    async def _generation(asked: GenerationRequest, files: Files) -> Job:
        mask: Labels | None = None
        warnings: list[str] = []
        if files:
            mask, warnings = await asyncio.to_thread(read_masks, files["semantic_mask"], asked.mask_order, limits)
        labels, further = await asyncio.to_thread(fitted, mask, asked.height_and_width, bundle.default_size)
        height, width = labels.shape
        check_pixels(height, width, limits)
        shape = Shape(height, width, asked.num_inference_steps, asked.guidance_scale, asked.condition_scale)
        return await _job(asked, asked.prompt, asked.seed, labels, shape, warnings + further)

    async def _edit(asked: EditRequest, files: Files) -> Job:
        edit = await asyncio.to_thread(read_edit, asked, files, limits, bundle=bundle.content_hash)
        start = edit.start
        height, width = edit.labels.shape
        shape = Shape(height, width, **edit.options, strength=start.strength, keeps=start.weights is not None)
        prompt = "" if asked.prompt is None and not bundle.has_text_encoders else edit.prompt
        return await _job(asked, prompt, edit.seed, edit.labels, shape, edit.warnings, start)

    async def _job(
        asked: ImagesRequest,
        prompt: str,
        seed: int | None,
        labels: Labels,
        shape: Shape,
        warnings: list[str],
        start: StartImage | None = None,
    ) -> Job:
        if prompt and not bundle.has_text_encoders:
            raise Refusal(422, "this model has no text encoders, so it takes no prompt", param="prompt")
        has_guidance = bundle.config.transformer.guidance_embeds
        shape = shape._replace(num_inference_steps=studio.pipe.steps_of(shape.num_inference_steps))
        warnings = warnings + await asyncio.to_thread(_told_of_words, known, prompt)
        return Job(
            prompt=prompt,
            labels=labels,
            shape=shape,
            start=start,
            seed=secrets.randbelow(SEEDS) if seed is None else seed,
            count=asked.n,
            kind=asked.output_format,
            watched=asked.stream,
            previews=asked.partial_images if asked.stream else 0,
            warnings=warnings + await asyncio.to_thread(_told_of_guidance, shape.guidance_scale, has_guidance),
        )

    return app


def _told_of_guidance(scale: float, has_guidance: bool) -> list[str]:
    with noted_warnings() as told:
        warn_of_guidance(scale, has_guidance)
    return told


def _told_of_words(known: KnownWords | None, prompt: str) -> list[str]:
    unseen = known.unseen(prompt) if known is not None else []
    return [known.warning(unseen)] if known is not None and unseen else []


def _mask_data(labels: Labels) -> dict[str, Any]:
    """A mask as JSON has it: class numbers in base64, row by row."""
    height, width = labels.shape
    return {"width": width, "height": height, "labels": as_text(labels.tobytes())}


def _described(kind: type[ImagesRequest]) -> dict[str, Any]:
    """A request's fields for /openapi.json."""
    return {"requestBody": {"content": {"application/json": {"schema": kind.model_json_schema()}}}}


def _serve_file(app: FastAPI, path: str, name: str) -> None:
    """Serve one file of the page. Only files of this list can be asked for, so that no path leads elsewhere."""
    content = package_files("mogle_rt.server").joinpath("page", name).read_bytes()
    kind = KINDS[name.rpartition(".")[2]]

    @app.get(path, include_in_schema=False)
    async def serve() -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})
