"""Pipelines in other processes: copies and pickles open the bundle anew, and a forked one is refused at once."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from mogle_rt import InputError, Pipeline
from mogle_rt.bundle.bundle import Bundle
from tests.calls.other_process import draw, draw_into


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Pipeline:
    return Pipeline(tiny_bundle, device="cpu", dtype="fp32", model_config={"independent_condition": True})


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_opens_the_bundle_anew(
    copied: Any, pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = copied(pipe)
    assert other.engine is not pipe.engine
    assert other.model_config == pipe.model_config
    assert torch.equal(draw(other), draw(pipe))


def test_a_pickle_is_small_and_of_an_absolute_path(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_bundle.parent)
    saved = pickle.dumps([Pipeline(tiny_bundle.name, device="cpu", dtype="fp32"), Bundle(tiny_bundle.name)])
    assert len(saved) < 4096
    monkeypatch.chdir(tmp_path)
    pipe, bundle = pickle.loads(saved)
    assert bundle.content_hash == pipe.bundle.content_hash == Bundle(tiny_bundle).content_hash


def test_a_spawned_process_draws_the_same(pipe: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "drawn.pt"
    process = multiprocessing.get_context("spawn").Process(target=draw_into, args=(pickle.dumps(pipe), str(path)))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert torch.equal(torch.load(path), draw(pipe))


@pytest.mark.quick
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_is_told_what_to_do(pipe: Pipeline) -> None:
    """The error comes before any wait. A thread that is drawing at the time of the fork holds the pipeline's lock,
    and doesn't exist in the fork, so nobody would ever release it there."""
    expected, held, done = draw(pipe), threading.Event(), threading.Event()

    def draw_meanwhile() -> None:
        with pipe._lock:
            held.set()
            done.wait()

    other = threading.Thread(target=draw_meanwhile)
    other.start()
    held.wait()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(60)  # ends a fork that waits forever
        try:
            draw(pipe)
        except InputError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        message = said.read()
    done.set()
    other.join()
    assert os.waitpid(child, 0)[1] == 0
    assert f"can't be used in its fork {child}; " in message
    assert "method 'spawn'" in message
    assert torch.equal(draw(pipe), expected)  # the parent draws on
