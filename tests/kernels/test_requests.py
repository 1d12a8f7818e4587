"""The bytes that all programs of a kernel request, repeats and padding included, are counted exactly, and at FLUX's
sizes they are near the least."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl

from mogle_rt.kernels import __main__ as command
from mogle_rt.kernels import requested as requested_module
from mogle_rt.kernels import workloads
from mogle_rt.kernels.aot import Resources
from mogle_rt.kernels.common import launch, recording
from mogle_rt.kernels.requested import Requested, counted, requested
from mogle_rt.kernels.requested import main as requested_command
from tests.conftest import in_the_interpreter

# How many times the bytes that it must read a kernel may request. Caches have to give what is beyond the first time.
MOST_REREADING = {"gate_mix": 1.5, "gate_mix_mean": 1.6, "region_experts": 1.6, "region_expert_mix": 3.5}


@triton.jit  # type: ignore[untyped-decorator]
def _square(x_ptr, out_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    at = rows[:, None] * BLOCK + cols[None, :]
    x = tl.load(x_ptr + at, mask=(rows < n)[:, None], other=0.0)
    tl.store(out_ptr + tl.program_id(0) * BLOCK * BLOCK + at, tl.dot(x, x))


@in_the_interpreter
def test_every_program_counts() -> None:
    """Three programs each read the same ten rows, multiply sixteen and write sixteen: all of it counts three times."""
    x, out = torch.randn(16, 16), torch.empty(3, 16, 16)
    with counted() as total:
        _square[(3,)](x, out, 10, BLOCK=16)
    assert (total.read, total.written, total.flops) == (3 * 10 * 16 * 4, 3 * 16 * 16 * 4, 3 * 2 * 16**3)
    _square[(1,)](x, out, 10, BLOCK=16)
    assert total.flops == 3 * 2 * 16**3, "a launch was counted after the block's end"


@in_the_interpreter
def test_other_threads_are_not_counted() -> None:
    """Two threads count and record at the same time; each sees its own kernel alone, and the second one still runs it."""
    x, mine, others = torch.randn(16, 16), torch.empty(1, 16, 16), torch.zeros(2, 16, 16)
    entered, done = threading.Event(), threading.Event()
    found: list[Requested] = []

    def other() -> None:
        assert entered.wait(60)
        with counted() as total:
            launch(_square, (2,), x, others, 16, BLOCK=16)
        found.append(total)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with counted() as total, recording() as launches:
        entered.set()
        assert done.wait(60)
        launch(_square, (1,), x, mine, 16, BLOCK=16)
        assert len(launches) == 1
    thread.join()
    assert (total, found[0].flops) == (Requested(), 2 * 2 * 16**3)
    assert torch.allclose(others[1], x @ x, atol=1e-4)


def mixture(name: str, device: str) -> workloads.Workload:
    with recording():  # tiles are those of a GPU then, and so is the number of partial sums
        works = workloads.mixtures(workloads.New(torch.bfloat16, device), 1)
    return next(work for work in works if work.name == name)


def sizes_of_tiles(name: str) -> list[dict[str, Any]]:
    """The compile-time constants of a call's kernels, without the number of partial sums, which depends on the tokens."""
    return [launch.meta | {"SUMS": None} for launch in mixture(name, "meta").launches()]


@in_the_interpreter
@pytest.mark.parametrize("name", MOST_REREADING)
def test_requests_are_near_the_least(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written twice, and repeated reads stay within a bound.

    An eighth of the image's tokens is enough: tiles are the same as with all tokens, so each program requests the same,
    and there are an eighth as many programs.
    """
    tiles = sizes_of_tiles(name)
    monkeypatch.setattr(workloads, "IMAGE", workloads.IMAGE // 8)
    assert sizes_of_tiles(name) == tiles
    work = mixture(name, "cpu")
    least, asked = work.declared(), requested(work)
    assert asked.written == least.written
    assert least.read <= asked.read <= MOST_REREADING[name] * least.read
    assert 0.9 * least.flops <= asked.flops <= 1.2 * least.flops


class CountedHere:
    """Stands for the process that counts: it runs the same command, with an eighth of the tokens, in this process."""

    def __init__(self, command: list[str], *, env: dict[str, str], **_: Any) -> None:
        assert command[:3] == [sys.executable, "-m", "mogle_rt.kernels.requested"]
        assert env["TRITON_INTERPRET"] == "1"
        out = io.StringIO()
        with mock.patch.dict(os.environ, env), contextlib.redirect_stdout(out):
            self.returncode = requested_command(command[3:])
        self.out = out.getvalue()

    def communicate(self) -> tuple[str, None]:
        return self.out, None

    def poll(self) -> int:
        return self.returncode


@in_the_interpreter
def test_the_table_has_both(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints, as JSON and as a table, what was compiled, the least bytes, and the bytes that are requested.

    `test_compilation` compiles the kernels; here one prepared row is used instead.
    """
    compiled = Resources(
        kernel="gate_mix", target="sm_90", registers=128, spills=0, stack=0, shared=4096, warps=4, instructions={}
    )
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(command, "compile_all", lambda names, *_: [(name, "bf16", compiled) for name in names])
    monkeypatch.setattr(subprocess, "Popen", CountedHere)
    monkeypatch.setattr(requested_module, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    monkeypatch.setattr(workloads, "IMAGE", workloads.IMAGE // 8)
    arguments = ["--kernel", "gate_mix", "--target", "sm_90"]
    assert command.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["compiled"][0]["registers"] == 128
    (row,) = found["least"]
    assert row["requested_written"] == row["written"]
    assert row["requested_read"] > row["read"]
    command._print(found["compiled"], found["least"])
    table = capsys.readouterr().out
    for word in ("registers", "spills", "shared", "stack", "16-byte loads + stores", "2-byte", "MB read", "gate_mix"):
        assert word in table


def test_failing_to_count_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is that of the real process, which is given an unknown dtype. (The command line refuses it earlier.)"""
    with pytest.raises(RuntimeError, match="counting what programs request failed with exit code 2"):
        command._with_requested([], command._requested(["gate_mix"], ["int3"]))
