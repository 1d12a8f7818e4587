"""``python -m tests.fuzz.soak --images 1000`` or ``--minutes 60``: long work in one process, and whether it stays as it was.

With ``--images``, one pipeline draws images of mixed sizes, masks and batches, and edits them. With ``--minutes``,
`mogle-rt serve demo` answers a mixed load: images, edits, broken requests, requests that are given up. A table shows
the process's memory and open handles as it goes on. The run fails if a request ends otherwise than it should, or if a
seed gives other bytes at the end than in the beginning.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx
import numpy as np

from benchmarks.server_load import BROKEN, EDITS, GENERATIONS, HAIR, Edits, body_of, serving
from mogle_rt import Pipeline
from mogle_rt.bundle.shipped import examples
from mogle_rt.masks import to_labels

SIDES = (32, 48, 64, 80, 96)  # pixels: the demo's own images of 128 pixels take several times as long
CACHE = 4 << 20  # bytes: full after a tenth of the images, so that most of them push something out


@dataclass(frozen=True)
class Held:
    """What a process holds: megabytes of its own and its share of what is shared, open handles, threads."""

    resident: float
    share: float
    handles: int
    threads: int

    @classmethod
    def by(cls, process: int) -> Held:
        folder = Path(f"/proc/{process}")
        found = dict(line.split(":", 1) for line in (folder / "smaps_rollup").read_text().splitlines()[1:])
        megabytes = {name: int(value.split()[0]) / 1024 for name, value in found.items()}
        count = {what: len(list((folder / what).iterdir())) for what in ("fd", "task")}
        return cls(megabytes["Rss"], megabytes["Pss"], count["fd"], count["task"])


class Log:
    """A table of what a process holds, a row at a time."""

    def __init__(self, process: int, unit: str) -> None:
        self.process, self.rows = process, list[Held]()
        print(f"| {unit} | resident, MB | share, MB | handles | threads |\n|--:|--:|--:|--:|--:|")

    def row(self, at: int) -> None:
        held = Held.by(self.process)
        self.rows.append(held)
        print(f"| {at:,} | {held.resident:,.0f} | {held.share:,.0f} | {held.handles} | {held.threads} |", flush=True)

    def summary(self) -> str:
        """The second quarter's mean memory and most handles beside the last quarter's: the first warms up."""
        n = len(self.rows)
        early, late = self.rows[n // 4 : n // 2] or self.rows[:1], self.rows[n - max(n // 4, 1) :]
        memory = [sum(h.share for h in part) / len(part) for part in (early, late)]
        handles = [max(h.handles for h in part) for part in (early, late)]
        return f"memory {memory[0]:,.1f} MB, then {memory[1]:,.1f} MB; handles {handles[0]}, then {handles[1]}"


def images(count: int, seed: int) -> str:
    """Draw that many images and edits by one pipeline. Returns what it held.

    Raises:
        AssertionError: the first images, drawn again at the end, are others.
    """
    pipe = Pipeline("demo", device="cpu", dtype="fp32", cache_bytes=CACHE)
    pipe.set_progress_bar_config(disable=True)
    masks = [one.mask.read_bytes() for one in examples()]
    log, kinds, first, done = Log(os.getpid(), "images"), Counter[str](), list[str](), 0

    def draw(number: int) -> tuple[str, list[np.ndarray]]:
        r = random.Random(f"{seed}/{number}")
        height, width, batch = r.choice(SIDES), r.choice(SIDES), r.choice((1, 1, 2, 3))
        labels = [to_labels(r.choice(masks), height=height, width=width) for _ in range(batch)]
        prompts, steps = [f"face {r.randrange(1000)}" for _ in range(batch)], r.choice((1, 2, 3))
        drawn = pipe(labels, prompts, steps, height=height, width=width, seed=r.randrange(100)).images
        if number % 4:
            return "images", [np.asarray(one) for one in drawn]
        after = [one.copy() for one in labels]
        for one in after:
            one[8:24, 8 : 9 + r.randrange(24)] = HAIR
        edited = pipe.edit(
            drawn, labels, after, prompts, 0.9, num_inference_steps=steps + 1, seed=r.randrange(100)
        ).images
        return "edits", [np.asarray(one) for one in (*drawn, *edited)]

    number = 0
    log.row(0)
    while done < count:
        kind, pixels = draw(number)
        if number < 8:
            first.append(_digest(pixels))
        kinds[kind] += 1
        number, before, done = number + 1, done, done + len(pixels)
        if done * 20 // count > before * 20 // count:
            log.row(done)
    assert [_digest(draw(i)[1]) for i in range(8)] == first, "a seed gives another image at the end"
    return f"{done:,} images in {number:,} calls {dict(kinds)}: {log.summary()}; the first 8 calls give the same bytes"


def server(minutes: float, seed: int, pause: float) -> str:
    """Keep the program under a mixed load. Returns what it held.

    Raises:
        AssertionError: an answer is of another status than it should, or a request's bytes differ from the first time.
    """
    pipe = Pipeline("demo", device="cpu", dtype="fp32")
    pipe.set_progress_bar_config(disable=True)
    edits, bodies = Edits(pipe), dict[tuple[str, int], str]()
    del pipe
    kinds, again, number = Counter[str](), 0, 0
    with serving("--queue", "64") as (url, process), httpx.Client(base_url=url, timeout=300, trust_env=False) as client:

        def ask(path: str, i: int, body: dict[str, object]) -> None:
            nonlocal again
            answer = client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            digest = hashlib.sha256(answer.json()["data"][0]["b64_json"].encode()).hexdigest()
            again += (path, i) in bodies
            assert bodies.setdefault((path, i), digest) == digest, f"{path}: seed {i} gives another image than before"

        log, begin, at = Log(process.pid, "minutes"), time.monotonic(), -1
        while (passed := (time.monotonic() - begin) / 60) < minutes:
            if int(passed) > at:
                at = int(passed)
                log.row(at)
            r = random.Random(f"{seed}/{number}")
            number, i, kind = number + 1, r.randrange(40), r.choices(list(LOAD), list(LOAD.values()))[0]
            body = body_of(i, 1, "x".join(str(16 * (2 + n)) for n in (i % 5, i // 5 % 5)))
            if kind == "image":
                ask(GENERATIONS, i, body)
            elif kind == "edit":
                ask(EDITS, i, edits.body(i, 1))
            elif kind == "broken":
                answer = client.post(r.choice((GENERATIONS, EDITS)), json=body | r.choice(BROKEN))
                assert 400 <= answer.status_code < 500, answer.text
            else:
                long = body | {"num_inference_steps": 50, "stream": True, "partial_images": 3}
                with client.stream("POST", GENERATIONS, json=long) as stream:
                    for _, _ in zip(range(r.randrange(8)), stream.iter_lines(), strict=False):
                        pass
            kinds[kind] += 1
            time.sleep(r.uniform(0, 2 * pause))
        for path, i in list(bodies)[:8]:
            size = "x".join(str(16 * (2 + n)) for n in (i % 5, i // 5 % 5))
            ask(path, i, body_of(i, 1, size) if path == GENERATIONS else edits.body(i, 1))
        assert client.get("/health").json()["waiting"] == 0
        log.row(round(minutes))
    return f"{number:,} requests {dict(kinds)}, {again} of them asked before, with the same bytes: {log.summary()}"


LOAD = {"image": 60, "edit": 20, "broken": 10, "given up": 10}  # kinds of requests, and their shares in per cent


def _digest(pixels: list[np.ndarray]) -> str:
    return hashlib.sha256(b"".join(one.tobytes() for one in pixels)).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.soak", description=__doc__)
    parser.add_argument("--images", type=int, help="draw so many images and edits in one process")
    parser.add_argument("--minutes", type=float, help="keep the server under load for so long")
    parser.add_argument("--pause", type=float, default=0.3, help="seconds between two requests, on average")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    runs: list[Callable[[], str]] = []
    if options.images:
        runs.append(lambda: images(options.images, options.seed))
    if options.minutes:
        runs.append(lambda: server(options.minutes, options.seed, options.pause))
    for run in runs:
        print(f"\nseed {options.seed}: {run()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
