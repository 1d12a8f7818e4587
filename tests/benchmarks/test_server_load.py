"""A small run of `benchmarks.server_load`: no request is lost, good ones get the right image, junk is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.server_load import fuzz, mixed
from mogle_rt import Pipeline
from tests.server.live import Live, live


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    pipe = Pipeline("demo", device="cpu", dtype="fp32")
    pipe.set_progress_bar_config(disable=True)
    with live([pipe], places=64) as running:
        yield running


def test_fuzzed_requests_are_refused(served: Live) -> None:
    fuzz(served.url, 100)


def test_mixed_requests_are_answered(served: Live) -> None:
    """The server's own pipeline draws the images to compare with, when it isn't busy with a request."""
    mixed(served.url, served.studio.pipe, 40, steps=1)
    assert served.studio.metrics.cancelled._value.get() == 2
