"""A server in this process, on a free port, for tests of the server and of the page."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mogle_rt import Pipeline
from mogle_rt.bundle.shipped import examples
from mogle_rt.server.app import build_app
from mogle_rt.server.asked.requests import Limits
from mogle_rt.server.drawing import Studio
from mogle_rt.server.running import Server, listen, make_server

MASKS = {one.name: one.mask.read_bytes() for one in examples()}
GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
SMALL = {"size": "64x64", "num_inference_steps": 2}
LONG = {"size": "64x64", "num_inference_steps": 100}


@dataclass
class Live:
    """A running server, and a client for it."""

    url: str
    client: httpx.Client
    studio: Studio
    server: Server
    thread: threading.Thread

    def draw(self, **fields: Any) -> httpx.Response:
        return self.client.post(GENERATIONS, json=SMALL | fields)


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def pixels(b64: str) -> NDArray[np.uint8]:
    """The pixels of an image in an answer."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB"))


def own_pixels(pipe: Pipeline, mask: str, prompt: str, seed: int, **options: Any) -> NDArray[np.uint8]:
    """The pixels of the image that a call of the pipeline draws with the same options."""
    call = {"height": 64, "width": 64, "num_inference_steps": 2} | options
    from mogle_rt.masks import to_labels

    labels = to_labels(MASKS[mask], height=call["height"], width=call["width"])
    return np.asarray(pipe(labels, prompt, seed=seed, **call).images[0])


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error in an answer. It must have the shape of OpenAI's errors, and one sentence."""
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert "Traceback" not in answer.text
    return error


def events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line[6:])


@contextmanager
def live(
    pipes: list[Pipeline],
    *,
    keys: list[bytes] | None = None,
    limits: Limits | None = None,
    grace: float = 30,
    **options: Any,
) -> Iterator[Live]:
    """Serve until the block ends. Within it this process draws with one thread, as their number changes the rounding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    studio = Studio(pipes, **options)
    studio.start()
    listening = listen("127.0.0.1", 0)
    ready = threading.Event()
    app = build_app(studio, "demo", keys=keys, limits=limits)
    server = make_server(app, studio, grace=grace, ready=ready.set)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()
    assert ready.wait(60)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
            yield Live(url, client, studio, server, thread)
    finally:
        torch.set_num_threads(threads)
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
