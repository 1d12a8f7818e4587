"""Times the server: an image through HTTP and by the call, and eight clients at once. `server_load` does more, by hand."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.server_load import GENERATIONS, SQUARE, body_of, own, serving
from mogle_rt import Pipeline

STEPS, ROUNDS = 28, 5


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving() as (address, _):
        yield address


def ask(url: str, i: int) -> None:
    with httpx.Client(base_url=url, timeout=300, trust_env=False) as client:
        assert client.post(GENERATIONS, json=body_of(i, STEPS, SQUARE)).status_code == 200


def test_served_image(url: str, benchmark: BenchmarkFixture) -> None:
    benchmark.pedantic(ask, args=(url, 0), rounds=ROUNDS, warmup_rounds=2)  # type: ignore[no-untyped-call]


def test_called_image(benchmark: BenchmarkFixture) -> None:
    pipe = Pipeline("demo")
    pipe.set_progress_bar_config(disable=True)
    benchmark.pedantic(own, args=(pipe, 0, body_of(0, STEPS, SQUARE)), rounds=ROUNDS, warmup_rounds=1)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("clients", [1, 8])
def test_eight_images(clients: int, url: str, benchmark: BenchmarkFixture) -> None:
    def every() -> None:
        with ThreadPoolExecutor(clients) as threads:
            list(threads.map(lambda i: ask(url, 2 * i), range(8)))

    benchmark.pedantic(every, rounds=2, warmup_rounds=1)  # type: ignore[no-untyped-call]
