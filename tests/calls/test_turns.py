"""Pipelines in other processes: pickled and copied they open anew, and a fork is refused in time."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mogle_rt import Pipeline
from mogle_rt.bundle.bundle import Bundle
from tests.calls.test_habits import run


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
    assert torch.equal(run(other), run(pipe))


def test_a_pickle_is_small_and_of_an_absolute_path(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_bundle.parent)
    saved = pickle.dumps([Pipeline(tiny_bundle.name, device="cpu", dtype="fp32"), Bundle(tiny_bundle.name)])
    assert len(saved) < 4096
    monkeypatch.chdir(tmp_path)
    pipe, bundle = pickle.loads(saved)
    assert bundle.content_hash == pipe.bundle.content_hash == Bundle(tiny_bundle).content_hash


def draw_into(pipe: Pipeline, path: str) -> None:
    torch.save(run(pipe), path)


@pytest.mark.slow
def test_a_spawned_process_draws_the_same(pipe: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "drawn.pt"
    process = multiprocessing.get_context("spawn").Process(target=draw_into, args=(pipe, str(path)))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert torch.equal(torch.load(path), run(pipe))


FORK = """
import os, sys
from mogle_rt import InputError, Pipeline

pipe = Pipeline(sys.argv[1], device="cpu", dtype="fp32")
options = dict(num_inference_steps=1, height=32, width=32)
pipe(None, "a", **options)
pipe._lock.acquire()  # as if another thread were drawing, which doesn't exist in the fork
child = os.fork()
if not child:
    try:
        pipe(None, "a", **options)
    except InputError as error:
        print(error, flush=True)
    os._exit(0)
print(os.waitpid(child, 0)[1] == 0, flush=True)
pipe._lock.release()
pipe(None, "a", **options)
print("the parent draws on")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_is_told_what_to_do(tiny_bundle: Path) -> None:
    command = [sys.executable, "-c", FORK, str(tiny_bundle)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "can't be used in its fork" in said
    assert "method 'spawn'" in said
    assert said.splitlines()[1:] == ["True", "the parent draws on"]
