"""When the benchmarks measure the processors, they change nothing in the program."""

from __future__ import annotations

import os

import pytest

from benchmarks.cores import transfer_rate

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads can't be bound here")


def test_only_the_probing_threads_are_bound() -> None:
    before = os.sched_getaffinity(0)
    rate = transfer_rate()
    assert os.sched_getaffinity(0) == before
    if len(before) > 1:
        assert rate is not None
        assert 1e7 < rate < 1e12


def test_no_rate_where_there_is_one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert transfer_rate() is None


def test_no_rate_where_threads_may_not_be_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert transfer_rate() is None
