"""Puts `mogle-rt serve` under load: mixed requests, fuzzed requests, several clients, and a stop in the middle of it all.

    python -m benchmarks.server_load             # minutes; --requests, --fuzz and --steps make it shorter

Every good answer is compared with the pipeline's own image. The figures are printed; a wrong answer ends the program.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
from PIL import Image

from mogle_rt import Pipeline
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.bundle.shipped import examples
from mogle_rt.masks import to_image, to_labels
from mogle_rt.memory.threads import suitable_threads
from mogle_rt.server.drawing import tokens_of

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
HAIR = 13
MASKS = {one.name: one.mask.read_bytes() for one in examples()}
NAMES = sorted(MASKS)
SQUARE = "{0}x{0}".format(Bundle("demo").default_size)
BROKEN: list[dict[str, Any]] = [
    {"seed": "x"},
    {"size": "65x64"},
    {"colour": 1},
    {"semantic_mask": "/etc/passwd"},
    {"n": 0},
]


@contextlib.contextmanager
def serving(*options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The program, on a free port; it is killed if it is still there at the end."""
    command = [sys.executable, "-m", "mogle_rt", "serve", "demo", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        found = re.search(r"http://\S+:\d+", process.stderr.readline())
        assert found, "the server didn't start"
        drain = ThreadPoolExecutor(1)
        drain.submit(process.stderr.read)  # the log: a full pipe would stop the server
        yield found[0], process
    finally:
        process.kill()
        process.wait()


def body_of(i: int, steps: int, size: str = "64x64") -> dict[str, Any]:
    """The request number i; its image can be drawn again by `own`."""
    mask = base64.b64encode(MASKS[NAMES[i % len(NAMES)]]).decode()
    return {
        "prompt": f"face {i % 5}",
        "semantic_mask": mask,
        "seed": i,
        "num_inference_steps": steps + i % 2,
        "size": size,
    }


def own(pipe: Pipeline, i: int, body: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The pipeline's own image of a request, by as many threads: their number changes the rounding."""
    width, height = map(int, body["size"].split("x"))
    labels = to_labels(MASKS[NAMES[i % len(NAMES)]], height=height, width=width)
    steps, prompt = body["num_inference_steps"], body["prompt"]
    rows, of_model = tokens_of(pipe, height, width), pipe.bundle.config.transformer.width
    with suitable_threads(rows, of_model, pipe.device):
        return np.asarray(pipe(labels, prompt, steps, height=height, width=width, seed=i).images[0])


class Edits:
    """One face to edit for each mask, and edits of them: hair is added at the top left.

    Args:
        pipe: draws the faces, and the edits that answers are compared with.
    """

    def __init__(self, pipe: Pipeline) -> None:
        self.pipe = pipe
        self.faces = [own(pipe, i, body_of(i, 2)) for i in range(len(NAMES))]
        self.masks = [to_labels(MASKS[name], height=64, width=64) for name in NAMES]

    def after(self, i: int) -> np.ndarray[Any, Any]:
        edited = self.masks[i % len(NAMES)].copy()
        edited[8:24, 8 : 16 + i % 8] = HAIR
        return edited

    def body(self, i: int, steps: int) -> dict[str, Any]:
        """The request number i, whose image and masks are in base64."""
        files = {
            "image": Image.fromarray(self.faces[i % len(NAMES)]),
            "semantic_mask_before": to_image(self.masks[i % len(NAMES)]),
            "semantic_mask": to_image(self.after(i)),
        }
        sent: dict[str, Any] = {}
        for name, picture in files.items():
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            sent[name] = base64.b64encode(buffer.getvalue()).decode()
        return sent | {"prompt": f"face {i % 5}", "seed": i, "num_inference_steps": steps + i % 2, "strength": 0.9}

    def own(self, i: int, steps: int) -> np.ndarray[Any, Any]:
        face, before, prompt = self.faces[i % len(NAMES)], self.masks[i % len(NAMES)], f"face {i % 5}"
        rows, width = tokens_of(self.pipe, 64, 64), self.pipe.bundle.config.transformer.width
        with suitable_threads(rows, width, self.pipe.device):
            made = self.pipe.edit(face, before, self.after(i), prompt, 0.9, seed=i, num_inference_steps=steps + i % 2)
        return np.asarray(made.images[0])


def pixels(answer: httpx.Response) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))).convert("RGB"))


def resident(client: httpx.Client) -> float:
    """The server's memory in MB."""
    found = re.search(r"^process_resident_memory_bytes (\S+)", client.get("/metrics").text, re.MULTILINE)
    assert found
    return float(found[1]) / 1e6


def mixed(url: str, pipe: Pipeline, count: int, steps: int, clients: int = 16) -> None:
    """Requests, one in five of them an edit, of which one in twenty is broken and one in twenty is given up."""
    edits = Edits(pipe)

    def ask(i: int) -> tuple[int, str, httpx.Response | None]:
        body = body_of(i, steps)
        with httpx.Client(base_url=url, timeout=300, trust_env=False) as client:
            if i % 20 == 7:
                return i, "broken", client.post(GENERATIONS, json=body | BROKEN[i // 20 % len(BROKEN)])
            if i % 20 == 13:
                with client.stream(
                    "POST", GENERATIONS, json=body | {"stream": True, "num_inference_steps": 50}
                ) as answer:
                    for _, _ in zip(range(4), answer.iter_lines(), strict=False):
                        pass
                return i, "cancelled", None
            if i % 5 == 4:
                return i, "edit", client.post(EDITS, json=edits.body(i, steps))
            return i, "good", client.post(GENERATIONS, json=body)

    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        for i in range(4):
            client.post(GENERATIONS, json=body_of(i, steps))
        before = resident(client)
        with ThreadPoolExecutor(clients) as threads:
            answers = list(threads.map(ask, range(count)))
        after = resident(client)
        waiting = client.get("/health").json()["waiting"]
    kinds = Counter(kind for _, kind, _ in answers)
    for i, kind, answer in answers:
        if kind == "broken":
            assert answer is not None
            assert 400 <= answer.status_code < 500, answer.text
        if kind == "good":
            assert answer is not None
            assert answer.status_code == 200, answer.text
            assert np.array_equal(pixels(answer), own(pipe, i, body_of(i, steps))), f"request {i} is another image"
        if kind == "edit":
            assert answer is not None
            assert answer.status_code == 200, answer.text
            assert np.array_equal(pixels(answer), edits.own(i, steps)), f"edit {i} is another image"
    assert waiting == 0
    print(f"mixed: {dict(kinds)}: all good answers are the pipeline's own; memory {before:.0f} MB, then {after:.0f} MB")


def raw(url: str, request: bytes) -> int:
    """The status of a request that no proper client would send; 400 where the connection is closed without any."""
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port), timeout=30) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(request)
        with contextlib.suppress(ConnectionError):
            answer = connection.recv(1000)
            if answer:
                status = int(answer.split()[1])
                assert 400 <= status < 500, answer
                return status
    return 400


def fuzz(url: str, count: int, seed: int = 0) -> None:
    """Requests of random sizes, types, texts, files and headers: none may end in 5xx, or in nothing."""
    chance = random.Random(seed)
    fields = [
        "prompt",
        "n",
        "size",
        "seed",
        "semantic_mask",
        "num_inference_steps",
        "guidance_scale",
        "stream",
        "x",
        "model",
        "image",
        "mask",
        "strength",
        "regions",
    ]
    junk: list[Any] = [
        None, True, -1, 0, 1e308, 2**70, "", "x" * 5000, "\ud800", "../../etc/passwd", "file:///etc/x", "1x1", "16x99999",
        [], {}, [[[]]], "data:;base64,", "AAAA", base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(30)).decode(), "<svg>", "%00",
    ]  # fmt: skip
    counted: Counter[int] = Counter()
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        for i in range(count):
            body = {name: chance.choice(junk) for name in chance.sample(fields, chance.randrange(1, 5))}
            if i % 5 == 0:
                path = chance.choice(
                    [
                        "/../../etc/passwd",
                        "/examples/%2e%2e/%2e%2e/x",
                        "/v1/jobs/../x",
                        "/%00",
                        "/x//",
                        "/v1/models/%2f",
                    ]
                )
                answer = client.request(chance.choice(["GET", "POST", "PUT", "DELETE"]), path)
            elif i % 5 == 1:
                kind = chance.choice(["application/json", "multipart/form-data; boundary=b", "text/html", "", "\x7f"])
                answer = client.post(
                    GENERATIONS, content=chance.randbytes(chance.randrange(400)), headers={"Content-Type": kind}
                )
            elif i % 5 == 2:
                picture = bytearray(MASKS["hat"])
                for _ in range(chance.randrange(1, 30)):
                    picture[chance.randrange(len(picture))] = chance.randrange(256)
                data = {"num_inference_steps": "0"}  # so that a mask that is still whole isn't drawn
                path = chance.choice([GENERATIONS, EDITS])
                name = "semantic_mask" if path == GENERATIONS else chance.choice(["image", "mask", "semantic_mask"])
                answer = client.post(path, files={name: ("../x", bytes(picture))}, data=data)
            elif i % 5 == 3:
                name = chance.choice(["Host", "Origin", "Authorization", "Content-Length", "Transfer-Encoding", "A b"])
                value = chance.choice(["x", "9" * 30, "-1", "chunked", "x" * 70_000, "\x01"])
                counted[raw(url, f"GET /v1/models/x HTTP/1.1\r\n{name}: {value}\r\n\r\n".encode())] += 1
                continue
            else:
                text = json.dumps(body | {"num_inference_steps": chance.choice([0, "x", 10**6])})
                path = chance.choice([GENERATIONS, EDITS])
                answer = client.post(path, content=text, headers={"Content-Type": "application/json"})
            counted[answer.status_code] += 1
            assert 400 <= answer.status_code < 500, (i, answer.status_code, answer.text)
        assert client.get("/health").status_code == 200
    print(f"fuzz: {count} requests, statuses {dict(sorted(counted.items()))}; the server is up")


def speed(url: str, pipe: Pipeline, rounds: int, steps: int) -> None:
    """An idle server against the Python call, and eight clients against one."""

    def ask(i: int) -> float:
        start = time.perf_counter()
        with httpx.Client(base_url=url, timeout=300, trust_env=False) as client:
            assert client.post(GENERATIONS, json=body_of(2 * i, steps, SQUARE)).status_code == 200
        return time.perf_counter() - start

    def call(i: int) -> float:
        start = time.perf_counter()
        own(pipe, 2 * i, body_of(2 * i, steps, SQUARE))
        return time.perf_counter() - start

    for i in range(4):  # each pipeline has seen masks and prompts
        call(i)
        ask(i)
        ask(i)
    served, called = [], []
    for i in range(rounds):  # in turns, so that other work on the machine meets both
        called.append(call(i % 4))
        served.append(ask(i % 4))
    a, b = statistics.median(served), statistics.median(called)
    print(f"latency: {a * 1e3:.0f} ms by the server, {b * 1e3:.0f} ms by the call: {a / b:.2f} times")
    start = time.perf_counter()
    for i in range(rounds):
        ask(i % 4)
    alone = time.perf_counter() - start
    start = time.perf_counter()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, [i % 4 for i in range(rounds)]))
    together = time.perf_counter() - start
    print(
        f"throughput: {rounds / alone:.2f} images a second one at a time, {rounds / together:.2f} with 8 clients: ",
        end="",
    )
    print(f"{alone / together:.2f} times")


def stop(steps: int) -> None:
    """SIGTERM under load: every request is answered or refused, and the program ends."""

    def ask(i: int) -> str:
        try:
            with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
                return str(client.post(GENERATIONS, json=body_of(i, steps, SQUARE)).status_code)
        except httpx.ConnectError:
            return "refused"

    with serving() as (url, process), ThreadPoolExecutor(24) as threads:
        asked = [threads.submit(ask, i) for i in range(60)]
        time.sleep(2)
        start = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        seconds = time.perf_counter() - start
        counted = Counter(one.result() for one in asked)
    assert set(counted) <= {"200", "503", "429", "refused"}, counted
    print(f"stop: {dict(sorted(counted.items()))}; the program ended after {seconds:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--fuzz", type=int, default=500)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=16)
    given = parser.parse_args()
    pipe = Pipeline("demo")
    pipe.set_progress_bar_config(disable=True)
    with serving("--queue", "64") as (url, _):
        fuzz(url, given.fuzz)
        mixed(url, pipe, given.requests, 2)
        speed(url, pipe, given.rounds, given.steps)
    stop(given.steps)


if __name__ == "__main__":
    main()
