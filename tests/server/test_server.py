"""The server over HTTP: its images equal the pipeline's, and wrong requests are refused with one sentence."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from mogle_rt import FastConfig, Pipeline
from mogle_rt.masks import colorize, to_labels
from mogle_rt.masks.sizes import default_size
from mogle_rt.server.asked.requests import Limits
from mogle_rt.server.drawing import Cores, pipelines
from mogle_rt.server.jobs import Job, Queued, Shape, Waiting
from mogle_rt.server.refusals import Refusal
from tests.server.live import (
    GENERATIONS,
    LONG,
    MASKS,
    SMALL,
    Live,
    encoded,
    error_of,
    events,
    live,
    own_pixels,
    pixels,
)  # fmt: skip

SECRET = "a sentence that no log may hold"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    """The pipeline whose images are compared with the answers. The server has pipelines of its own."""
    pipeline = Pipeline("demo", device="cpu", dtype="fp32")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipes(pipe: Pipeline) -> list[Pipeline]:
    made = [Pipeline("demo", device="cpu", dtype="fp32") for _ in range(2)]
    for one in made:
        one.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def served(pipes: list[Pipeline]) -> Iterator[Live]:
    with live(pipes, places=16) as running:
        yield running


@pytest.fixture
def one_worker(pipes: list[Pipeline]) -> Iterator[Live]:
    """A server with one thread that draws, two places for requests, and short time limits."""
    with live(pipes[:1], places=2) as running:
        yield running


def until(condition: Any) -> None:
    """Wait until the condition holds. It fails after a time that only something that hangs takes."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_answer_is_the_pipelines_own_image(served: Live, pipe: Pipeline) -> None:
    answer = served.draw(prompt="a woman", semantic_mask=encoded(MASKS["hat"]), seed=5, n=2)
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [one["seed"] for one in data] == [5, 6]
    for one in data:
        own = own_pixels(pipe, "hat", "a woman", one["seed"])
        assert np.array_equal(pixels(one["b64_json"]), own)


def test_an_uploaded_mask_is_the_same(served: Live, pipe: Pipeline) -> None:
    fields = {"prompt": "a man", "seed": "3", "size": "64x64", "num_inference_steps": "2", "condition_scale": "0.5"}
    upload = {"semantic_mask": ("../../etc/passwd", MASKS["beard"])}
    answer = served.client.post(GENERATIONS, data=fields, files=upload)
    assert answer.status_code == 200, answer.text
    own = own_pixels(pipe, "beard", "a man", 3, condition_scale=0.5)
    assert np.array_equal(pixels(answer.json()["data"][0]["b64_json"]), own)


def test_the_masks_shape_gives_the_size(served: Live) -> None:
    tall, side = io.BytesIO(), served.studio.pipe.bundle.default_size
    labels = np.tile(to_labels(MASKS["hat"]), (2, 1))
    np.save(tall, labels)
    answer = served.client.post(
        GENERATIONS, json={"semantic_mask": encoded(tall.getvalue()), "num_inference_steps": 1, "size": "auto"}
    )
    height, width = default_size([labels], side)
    assert height > width
    assert answer.json()["size"] == f"{width}x{height}"
    warnings = served.draw(semantic_mask=encoded(tall.getvalue())).json()["warnings"]
    assert "stretched" in warnings[0]
    assert f"made for images of {side} x {side}" in warnings[1]


def test_an_image_holds_its_settings(served: Live) -> None:
    answer = served.draw(prompt="a woman", semantic_mask=encoded(MASKS["bun"]), seed=9, output_format="png")
    picture = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    assert picture.info["prompt"] == "a woman"
    assert picture.info["seed"] == "9"
    assert "trainedAlgorithmicMedia" in picture.info["XML:com.adobe.xmp"]


@pytest.mark.parametrize(
    ("status", "fields", "words"),
    [
        (422, {"prompt": "x", "colour": "red"}, "unknown field 'colour'"),
        (422, {}, "give a prompt"),
        (422, {"prompt": 7}, "prompt"),
        (422, {"prompt": "x" * 4001}, "prompt"),
        (422, {"prompt": "x", "n": 0}, "n: must be"),
        (422, {"prompt": "x", "n": True}, "n"),
        (422, {"prompt": "x", "size": "100x64"}, "the nearest is 96"),
        (422, {"prompt": "x", "size": "99999x99999"}, "multiple of 16"),
        (422, {"prompt": "x", "size": "2048x2048"}, "at most 1,048,576 pixels"),
        (422, {"prompt": "x", "size": "large"}, "WIDTHxHEIGHT"),
        (422, {"prompt": "x", "num_inference_steps": 101}, "at most 100"),
        (422, {"prompt": "x", "guidance_scale": -1}, "guidance_scale"),
        (422, {"prompt": "x", "seed": -1}, "seed"),
        (422, {"prompt": "x", "seed": 2**63}, "seed"),
        (422, {"prompt": "x", "response_format": "url"}, "b64_json"),
        (404, {"prompt": "x", "model": "dall-e-3"}, "this server has 'demo'"),
        (400, {"semantic_mask": "/etc/passwd"}, "paths and addresses are not opened"),
        (400, {"semantic_mask": "https://example.com/mask.png"}, "paths and addresses are not opened"),
        (422, {"semantic_mask": encoded(b"/etc/passwd")}, "not a mask that can be read"),
        (422, {"semantic_mask": encoded(b"\x93NUMPY\x01\x00")}, "can't be read"),
        (422, {"semantic_mask": ""}, "not a mask that can be read"),
    ],
)
def test_wrong_fields_are_refused(served: Live, status: int, fields: dict[str, Any], words: str) -> None:
    answer = served.client.post(GENERATIONS, json=fields)
    assert answer.status_code == status, answer.text
    assert words in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("status", "content", "kind"),
    [
        (400, b"{", "application/json"),
        (400, b"\xff\xfe", "application/json"),
        (400, b"[" * 100_000, "application/json"),
        (422, b"[]", "application/json"),
        (422, b'{"prompt": "x", "guidance_scale": NaN}', "application/json"),
        (415, b"prompt=x", "application/x-www-form-urlencoded"),
        (415, b"", ""),
        (400, b"nothing", "multipart/form-data"),
        (400, b"nothing", "multipart/form-data; boundary=x"),
    ],
)
def test_wrong_bodies_are_refused(served: Live, status: int, content: bytes, kind: str) -> None:
    answer = served.client.post(GENERATIONS, content=content, headers={"Content-Type": kind})
    assert answer.status_code == status, answer.text
    error_of(answer)


def test_bombs_are_refused(served: Live) -> None:
    """Small files whose headers describe very large pictures or arrays are refused."""
    picture = io.BytesIO()
    Image.new("L", (4000, 4000)).save(picture, "PNG")
    answer = served.draw(semantic_mask=encoded(picture.getvalue()))
    assert answer.status_code == 422
    assert "at most 4,194,304 pixels" in error_of(answer)["message"]
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**6)})
    answer = served.draw(semantic_mask=encoded(array.getvalue()))
    assert answer.status_code == 422
    assert "0 are there" in error_of(answer)["message"]


def test_uploads_are_limited(pipes: list[Pipeline]) -> None:
    with live(pipes[:1], limits=Limits(upload=1000)) as running:

        def parts() -> Iterator[bytes]:
            for _ in range(100):
                yield b"x" * 100

        for content in (b"x" * 1001, parts()):
            answer = running.client.post(GENERATIONS, content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == 413
            assert "1,000 bytes" in error_of(answer)["message"]


def test_strangers_are_refused(served: Live) -> None:
    """A page of another site can't send requests from a visitor's browser, not even under a host name of its own that
    leads to this server."""
    for headers, status in (({"Host": "evil.example"}, 421), ({"Origin": "https://evil.example"}, 403)):
        answer = served.client.post(GENERATIONS, json=SMALL | {"prompt": "x"}, headers=headers)
        assert answer.status_code == status
        error_of(answer)
    assert served.client.get("/health", headers={"Origin": served.url}).status_code == 200
    assert served.client.get("/health", headers={"Host": "localhost:1"}).status_code == 200


def test_a_key_is_asked_for(pipes: list[Pipeline]) -> None:
    key = "a-key-of-the-test"
    with live(pipes[:1], keys=[b"another-key-of-it", key.encode()]) as running:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": key}):
            for path in ("/v1/models", "/metrics", "/settings.json"):
                answer = running.client.get(path, headers=given)
                assert answer.status_code == 401
                error_of(answer)
        right = {"Authorization": f"Bearer {key}", "Host": "faces.example"}
        assert running.client.get("/v1/models", headers=right).status_code == 200
        assert running.client.get("/").status_code == 200
        assert running.client.get("/health").status_code == 200


def test_other_addresses(served: Live) -> None:
    for path, status in (
        ("/v1/images", 404),
        (GENERATIONS, 405),
        ("/examples/../prompts.json", 404),
        ("/examples/..%2fprompts.json", 404),
        ("/examples/absent.png", 404),
        ("/page/index.html", 404),
        ("/v1/models/other", 404),
        ("/v1/models/", 404),
    ):
        answer = served.client.get(path)
        assert answer.status_code == status, path
        error_of(answer)
    assert served.client.get("/examples/hat.png").content == MASKS["hat"]
    assert served.client.get("/v1/models").json()["data"][0]["id"] == "demo"
    fields = served.client.get("/openapi.json").json()["paths"][GENERATIONS]["post"]["requestBody"]
    assert "semantic_mask" in fields["content"]["application/json"]["schema"]["properties"]


def test_masks_are_read_in_every_form(served: Live) -> None:
    labels = to_labels(MASKS["hat"])
    colours, array = io.BytesIO(), io.BytesIO()
    Image.fromarray(colorize(labels)).save(colours, "PNG")
    np.save(array, labels)
    forms = [[("semantic_mask", ("m", data))] for data in (MASKS["hat"], colours.getvalue(), array.getvalue())]
    parts = []
    for number, name in ((1, "skin"), (13, "hair")):
        plane = io.BytesIO()
        Image.fromarray((labels == number).astype(np.uint8) * 255).save(plane, "PNG")
        parts.append(("semantic_mask", (f"00000_{name}.png", plane.getvalue())))
    two = np.where(np.isin(labels, (1, 13)), labels, 0)
    for files, expected in ((forms[0], labels), (forms[1], labels), (forms[2], labels), (parts, two)):
        answer = served.client.post("/v1/masks", files=files).json()
        read = np.frombuffer(base64.b64decode(answer["labels"]), np.uint8).reshape(answer["height"], answer["width"])
        assert np.array_equal(read, expected)
    answer = served.client.post("/v1/masks", files=[("semantic_mask", ("x.png", b"no picture"))])
    assert answer.status_code == 422
    error_of(answer)


def test_a_stream_tells_steps_and_previews_and_changes_nothing(served: Live, pipe: Pipeline) -> None:
    asked = SMALL | {"prompt": "a woman", "semantic_mask": encoded(MASKS["bun"]), "seed": 1, "num_inference_steps": 6}
    with served.client.stream("POST", GENERATIONS, json=asked | {"stream": True, "partial_images": 2}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = list(events(answer))
    kinds = [event["type"].removeprefix("image_generation.") for event in told]
    assert kinds[0] == "queued"
    assert kinds[-1] == "completed"
    assert [event["step"] for event in told if event["type"].endswith("progress")] == [1, 2, 3, 4, 5, 6]
    previews = [event for event in told if event["type"].endswith("partial_image")]
    assert 1 <= len(previews) <= 2
    assert pixels(previews[0]["b64_json"]).shape == (64, 64, 3)
    own = own_pixels(pipe, "bun", "a woman", 1, num_inference_steps=6)
    assert np.array_equal(pixels(told[-1]["b64_json"]), own)


def test_fewer_steps_are_told_as_they_are_run(served: Live, pipe: Pipeline) -> None:
    """Where the server's fast mode is a shorter schedule: progress counts its steps, and previews know its noise levels."""
    asked = SMALL | {"prompt": "a woman", "semantic_mask": encoded(MASKS["bun"]), "seed": 1, "num_inference_steps": 20}
    served.studio.pipe.fast = FastConfig(most_steps=3)
    try:
        with served.client.stream("POST", GENERATIONS, json=asked | {"stream": True, "partial_images": 1}) as answer:
            told = list(events(answer))
    finally:
        served.studio.pipe.fast = None
    steps = [(event["step"], event["steps"]) for event in told if event["type"].endswith("progress")]
    assert steps == [(1, 3), (2, 3), (3, 3)]
    own = own_pixels(pipe, "bun", "a woman", 1, num_inference_steps=3)
    assert np.array_equal(pixels(told[-1]["b64_json"]), own)


def test_a_preview_looks_like_the_image(served: Live) -> None:
    """A preview half way is nearer to the final image than an image of another seed and prompt is."""
    asked = {"semantic_mask": encoded(MASKS["hat"]), "num_inference_steps": 8, "stream": True}
    made = []
    for prompt, seed in (("a woman with a yellow hat", 1), ("an old man on a black background", 2)):
        body = asked | {"prompt": prompt, "seed": seed, "partial_images": 1}
        with served.client.stream("POST", GENERATIONS, json=body) as answer:
            made.append([event for event in events(answer) if "b64_json" in event])
    (preview, image), (_, other) = ([pixels(event["b64_json"]).astype(float) for event in one] for one in made)
    assert np.abs(preview - image).mean() < np.abs(other - image).mean() / 2


def test_a_job_can_be_cancelled(one_worker: Live) -> None:
    with one_worker.client.stream("POST", GENERATIONS, json=LONG | {"prompt": "x", "stream": True}) as answer:
        told = events(answer)
        job = next(told)["job"]
        while next(told)["type"] != "image_generation.progress":
            pass
        assert httpx.delete(f"{one_worker.url}/v1/jobs/{job}", trust_env=False).json()["cancelled"]
        last = list(told)[-1]
    assert last["error"]["code"] == "cancelled"
    assert one_worker.draw(prompt="x").status_code == 200
    assert one_worker.client.delete(f"/v1/jobs/{job}").status_code == 404
    assert one_worker.studio.metrics.images._value.get() == 1


def test_a_client_that_leaves_frees_its_place(one_worker: Live) -> None:
    """When a client leaves, its image ends, whether it is being drawn or waits, and with a stream or without."""
    waiting = one_worker.studio.waiting
    for stream in (True, False):
        with contextlib.ExitStack() as stack:
            for number in range(3):
                client = stack.enter_context(httpx.Client(base_url=one_worker.url, timeout=60, trust_env=False))
                body = LONG | {"prompt": "x", "stream": stream}
                if stream:
                    stack.enter_context(client.stream("POST", GENERATIONS, json=body))
                else:
                    client.timeout = httpx.Timeout(0.5)
                    with pytest.raises(httpx.ReadTimeout):
                        client.post(GENERATIONS, json=body)
                    until(lambda: not len(waiting) and not one_worker.studio.metrics.drawing._value.get())
                if number == 0:
                    until(lambda: not len(waiting))  # it is being drawn
            if stream:
                assert len(waiting) == 2
                refused = one_worker.draw(prompt="x")
                assert refused.status_code == 429
                assert refused.headers["Retry-After"]
                assert "2 images wait already" in error_of(refused)["message"]
        until(lambda: not len(waiting) and not one_worker.studio.metrics.drawing._value.get())
    assert one_worker.studio.metrics.images._value.get() == 0


def test_stopping_finishes_or_refuses(pipes: list[Pipeline]) -> None:
    """The image that is being drawn is finished, waiting ones are refused, and the server ends."""
    with live(pipes[:1], places=8) as running, ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(running.draw, prompt="x", num_inference_steps=20, seed=i) for i in range(6)]
        until(lambda: len(running.studio.waiting) == 5)
        running.server.should_exit = True
        codes = sorted(one.result().status_code for one in asked)
        running.thread.join(60)
    assert codes == [200, *[503] * 5]


def test_stopping_does_not_wait_for_ever(pipes: list[Pipeline]) -> None:
    with live(pipes[:1], grace=0.2) as running, ThreadPoolExecutor(1) as threads:
        asked = threads.submit(running.client.post, GENERATIONS, json=LONG | {"prompt": "x", "size": "256x256"})
        until(lambda: running.studio.metrics.drawing._value.get())
        running.server.should_exit = True
        answer = asked.result()
    assert answer.status_code == 503
    assert error_of(answer)["code"] == "shutting_down"


def test_nothing_of_a_person_is_logged(
    served: Live, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even an error that quotes the prompt gets it into the log."""
    caplog.set_level(logging.DEBUG)
    served.draw(prompt=SECRET)
    served.draw(prompt=SECRET, size="1x1")
    served.client.get(f"/{SECRET}?{SECRET}")
    served.client.get("/", headers={"User-Agent": SECRET, "Referer": SECRET})

    def fail(self: Pipeline, *_: Any, **__: Any) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(Pipeline, "__call__", fail)
    answer = served.draw(prompt=SECRET)
    assert answer.status_code == 500
    assert SECRET not in answer.text
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("mogle_rt", "uvicorn"))]
    assert any("RuntimeError while drawing" in line for line in ours)
    assert not any(SECRET in line or SECRET.replace(" ", "%20") in line for line in ours)
    assert SECRET.replace(" ", "%20") not in served.client.get("/metrics").text


def test_one_bad_image_does_not_spoil_a_batch(
    pipe: Pipeline, pipes: list[Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a batch fails, each of its images is drawn alone. In a batch, an image equals the one drawn alone up to
    rounding."""
    call, sizes = Pipeline.__call__, []

    def fails_of_bad(self: Pipeline, masks: Any, prompts: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(prompts))
        if "bad" in prompts:
            raise MemoryError
        return call(self, masks, prompts, *args, **options)

    monkeypatch.setattr(Pipeline, "__call__", fails_of_bad)
    with live(pipes[:1], max_batch=3) as running, ThreadPoolExecutor(5) as threads:
        first = threads.submit(running.draw, prompt="x", num_inference_steps=40)
        until(lambda: sizes)
        asked = [threads.submit(running.draw, prompt=prompt, seed=4) for prompt in ("a woman", "bad", "a man")]
        first.result()
        answers = [one.result() for one in asked]
    assert [answer.status_code for answer in answers] == [200, 503, 200]
    assert sorted(sizes) == [1, 1, 1, 1, 3]
    monkeypatch.undo()
    blank = np.zeros((64, 64), np.uint8)
    own = np.asarray(pipe(blank, "a woman", seed=4, height=64, width=64, num_inference_steps=2).images[0])
    assert np.array_equal(pixels(answers[0].json()["data"][0]["b64_json"]), own)


@pytest.mark.quick
def test_cores_are_lent_in_turn_and_never_twice() -> None:
    """At most as many cores as there are are in use; whoever needs all of them gets them, though others keep asking."""
    cores, lock, used, most, widest = Cores(3), threading.Lock(), 0, 0, 0

    def draw(count: int) -> None:
        nonlocal used, most, widest
        for _ in range(20):
            with cores.lent(count):
                with lock:
                    used += min(count, 3)
                    most, widest = max(most, used), widest + (count > 3)
                time.sleep(0.0005)
                with lock:
                    used -= min(count, 3)

    with ThreadPoolExecutor(5) as threads:
        for one in [threads.submit(draw, count) for count in (1, 1, 2, 8, 0)]:
            one.result(60)
    assert (most, widest, used) == (3, 20, 0)


@pytest.mark.quick
def test_a_small_model_is_opened_for_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image of it takes one core. Where the number of threads is chosen, or pipelines are, that counts."""
    monkeypatch.setattr("mogle_rt.server.drawing.threads_are_chosen", lambda: False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    monkeypatch.setattr("mogle_rt.server.drawing.worthwhile_threads", lambda rows, width, most: 1)

    def opened() -> Pipeline:
        return Pipeline("demo", device="cpu", dtype="fp32")

    assert len(pipelines(opened)) == 3
    assert len(pipelines(opened, 1)) == 1
    monkeypatch.setattr("mogle_rt.server.drawing.worthwhile_threads", lambda rows, width, most: 2)
    assert len(pipelines(opened)) == 1
    monkeypatch.setattr("mogle_rt.server.drawing.threads_are_chosen", lambda: True)
    monkeypatch.setattr("mogle_rt.server.drawing.worthwhile_threads", lambda rows, width, most: 1)
    assert len(pipelines(opened)) == 1


@pytest.mark.quick
def test_a_batch_holds_images_of_one_shape_in_their_order() -> None:
    async def check() -> None:
        def job(steps: int, count: int = 1) -> Job:
            shape = Shape(64, 64, steps, 3.5, 1.0)
            return Job(prompt="", labels=np.zeros((64, 64), np.uint8), shape=shape, seed=0, count=count, watched=True)

        def taken(most: int) -> list[tuple[Job, int]]:
            return [(draw.job, draw.index) for draw in waiting.take(most)]

        waiting = Waiting(6)
        a, b, c, d = job(2), job(3, 2), job(2), job(3)
        for one in (a, b, c, d):
            waiting.put(one)
        with pytest.raises(Refusal, match="5 images wait already"):
            waiting.put(job(2, 2))
        with pytest.raises(Refusal, match="n can be at most 6"):
            waiting.put(job(2, 7))
        assert taken(2) == [(a, 0), (c, 0)]
        assert [await b.next_event(), await b.next_event()] == [Queued(1), Queued(0)]
        assert taken(2) == [(b, 0), (b, 1)]
        d.cancel()
        waiting.forget(d)
        assert len(waiting) == 0
        waiting.close()
        assert taken(1) == []
        with pytest.raises(Refusal, match="shutting down"):
            waiting.put(a)

    asyncio.run(check())


def test_many_clients(served: Live, pipe: Pipeline) -> None:
    """Many requests come at once. Each good one gets the pipeline's own image, each broken one an error, and none is
    lost."""
    names = sorted(MASKS)

    def ask(i: int) -> tuple[int, httpx.Response]:
        body: dict[str, Any] = {"prompt": f"face {i % 3}", "semantic_mask": encoded(MASKS[names[i % 8]]), "seed": i}
        body["num_inference_steps"] = 1 + i % 2
        if i % 8 == 7:
            body["seed"] = "many"
        with httpx.Client(base_url=served.url, timeout=120, trust_env=False) as client:
            return i, client.post(GENERATIONS, json=SMALL | body)

    with ThreadPoolExecutor(8) as threads:
        answers = dict(threads.map(ask, range(24)))
    for i, answer in answers.items():
        if i % 8 == 7:
            assert answer.status_code == 422
            continue
        assert answer.status_code == 200, answer.text
        own = own_pixels(pipe, names[i % 8], f"face {i % 3}", i, num_inference_steps=1 + i % 2)
        assert np.array_equal(pixels(answer.json()["data"][0]["b64_json"]), own)
    assert threading.active_count() < 60
