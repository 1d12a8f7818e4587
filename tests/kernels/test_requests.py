"""What programs ask for altogether, with repeats and padding: counted exactly, and at FLUX's sizes near the least."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from mogle_rt.kernels import workloads
from mogle_rt.kernels.__main__ import _print
from mogle_rt.kernels.common import launch, recording
from mogle_rt.kernels.requested import Requested, counted, requested
from tests.conftest import in_the_interpreter

# How many times what they must read kernels may ask for; a bound on what caches have to give.
MOST_REREADING = {"gate_mix": 1.5, "gate_mix_mean": 1.6, "region_experts": 1.6, "region_expert_mix": 3.5}


@triton.jit  # type: ignore[untyped-decorator]
def _square(x_ptr, out_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    at = rows[:, None] * BLOCK + cols[None, :]
    x = tl.load(x_ptr + at, mask=(rows < n)[:, None], other=0.0)
    tl.store(out_ptr + tl.program_id(0) * BLOCK * BLOCK + at, tl.dot(x, x))


@in_the_interpreter
def test_every_program_counts() -> None:
    """Three programs that read the same ten rows, and multiply and write sixteen."""
    x, out = torch.randn(16, 16), torch.empty(3, 16, 16)
    with counted() as total:
        _square[(3,)](x, out, 10, BLOCK=16)
    assert (total.read, total.written, total.flops) == (3 * 10 * 16 * 4, 3 * 16 * 16 * 4, 3 * 2 * 16**3)
    _square[(1,)](x, out, 10, BLOCK=16)
    assert total.flops == 3 * 2 * 16**3, "counted after its end"


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
    with recording():  # partial sums, too, are as many as a GPU's tiles make
        works = workloads.mixtures(workloads.New(torch.bfloat16, device), 1)
    return next(work for work in works if work.name == name)


def sizes_of_tiles(name: str) -> list[dict[str, Any]]:
    """What the kernels of a call are compiled for, but for the count of partial sums, which follows from the tokens."""
    return [launch.meta | {"SUMS": None} for launch in mixture(name, "meta").launches()]


@in_the_interpreter
@pytest.mark.parametrize("name", MOST_REREADING)
def test_requests_are_near_the_least(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written twice, and reading again stays within bounds.

    A quarter of the image's tokens is enough: programs have the tiles that they have for all tokens, so what each asks
    for is the same, and there are a quarter as many of them.
    """
    tiles = sizes_of_tiles(name)
    monkeypatch.setattr(workloads, "IMAGE", workloads.IMAGE // 4)
    assert sizes_of_tiles(name) == tiles
    work = mixture(name, "cpu")
    least, asked = work.declared(), requested(work)
    assert asked.written == least.written
    assert least.read <= asked.read <= MOST_REREADING[name] * least.read
    assert 0.9 * least.flops <= asked.flops <= 1.2 * least.flops


def test_the_table_has_both(capsys: pytest.CaptureFixture[str]) -> None:
    """What was compiled, what the work takes at least and what its programs ask for: for programs, and for people."""
    command = [sys.executable, "-m", "mogle_rt.kernels", "--kernel", "gate_mix", "--target", "sm_90", "--json"]
    done = subprocess.run(["env", "TRITON_INTERPRET=0", *command], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    (row,) = found["least"]
    assert row["requested_written"] == row["written"]
    assert row["requested_read"] > row["read"]
    _print(found["compiled"], found["least"])
    table = capsys.readouterr().out
    for word in ("registers", "spills", "shared", "stack", "16-byte loads + stores", "2-byte", "MB read", "gate_mix"):
        assert word in table
