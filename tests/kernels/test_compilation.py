"""What compilers make of every kernel for GPUs that needn't be there, read back from the machine code.

The kernels are compiled once for all tests here, in a process of its own, since this one may interpret them: see
`tests.kernels.compiled`. The table that it prints is kept in build/, and is made anew when anything changes that it
depends on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mogle_rt.kernels.__main__ import costs, main
from mogle_rt.kernels.chips import SHARED_LIMITS, TARGETS, compiled_for
from mogle_rt.kernels.workloads import DTYPES, workloads
from tests.conftest import make_once
from tests.kernels.compiled import GENERATIONS, OF_ONE_GENERATION, SAME_CODE

# Kernels without a matrix product, and where a product's tile is as large as the newer instructions need: 64 rows for
# wgmma and tcgen05. The others have 16 rows, since few tokens would otherwise leave most multiprocessors idle, or
# since the product is a thin one beside a norm.
WITHOUT_PRODUCT = {"qk_norm_rope", "mean_mix"}
LARGE_TILES = {"region_experts", "joint_attention"}
MEMORY_BOUND = {"stream_rows", "qk_norm_rope", "gate_mix", "mean_mix", "region_experts", "region_expert_mix"}
OWN_INSTRUCTION = {"sm_90": "wgmma", "sm_100": "tcgen05"}
# Accesses of two bytes that a kernel may have; others may have none. Over the stream, a program of 16 rows has as many
# threads as a branch of 16 columns has elements, and reads one each, and writes the branch's as tensor cores leave them;
# the norms' weights of a head (of q and of k) are one for each of a program's 128 threads.
MOST_NARROW = {"stream_rows": 3, "qk_norm_rope": 2}

Compiled = list[dict[str, Any]]
ROOT = Path(__file__).parents[2]


def sources_hash() -> str:
    """A hash of all that the table depends on: the kernels, the calls that are compiled, and the compilers' versions."""
    versions = [platform.python_version(), *(importlib.metadata.version(name) for name in ("torch", "triton"))]
    found = hashlib.sha256(" ".join(versions).encode())
    for path in (*sorted((ROOT / "kernels").glob("*.py")), ROOT / "tests" / "kernels" / "compiled.py"):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    """One table for all tests, also where workers run them in processes of their own."""
    table = make_once(ROOT / "build" / "compiled" / f"{sources_hash()}.json", compile_all)
    found: Compiled = json.loads(table.read_text())
    return found


def compile_all(table: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "1"}
    command = [sys.executable, "-m", "tests.kernels.compiled"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    table.write_text(done.stdout)


def label(r: dict[str, Any]) -> str:
    return f"{r['workload']}: {r['kernel']} in {r['dtype']} on {r['target']}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_kernel_compiles_for_every_gpu_within_its_limits(compiled: Compiled) -> None:
    """No register spills, and shared memory fits into that of every GPU with this code."""
    kernels = {r["kernel"] for r in compiled}
    assert len(kernels) == 7  # stream_rows is launched in three ways
    for target in GENERATIONS:
        assert {r["kernel"] for r in compiled if r["target"] == target} == kernels
    for r in compiled:
        limit = min(SHARED_LIMITS[target] for target in (r["target"], *SAME_CODE.get(r["target"], ())))
        assert r["spills"] == 0, label(r)
        assert r["shared"] <= limit, label(r)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_gpus_of_a_generation_have_the_same_code(compiled: Compiled) -> None:
    """So that one stands for all of them in the other tests."""
    assert {*GENERATIONS, *(other for others in SAME_CODE.values() for other in others)} == set(TARGETS)
    rows = {r["target"]: r for r in compiled if r["workload"] == OF_ONE_GENERATION and r["dtype"] == "bf16"}
    for target, others in SAME_CODE.items():
        for other in others:
            assert rows[other] | {"target": target} == rows[target], other


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_products_are_on_tensor_cores(compiled: Compiled) -> None:
    """And by wgmma on Hopper and tcgen05 on Blackwell, where the tile is large enough."""
    for r in compiled:
        if r["kernel"] in WITHOUT_PRODUCT or r["workload"].endswith("-plain"):
            assert r["tensor_cores"] == "", label(r)
            continue
        expected = "mfma" if r["target"].startswith("gfx") else "mma"
        if r["kernel"] in LARGE_TILES and not (r["dtype"] == "fp32" and r["kernel"] == "joint_attention"):
            expected = OWN_INSTRUCTION.get(r["target"], expected)
        assert r["tensor_cores"] == expected, label(r)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_is_moved_sixteen_bytes_at_a_time(compiled: Compiled) -> None:
    """Rows are, and what is moved two bytes at a time is counted: a row stride that Triton can't tell is aligned.

    With ranks filled up to 8 in place of 16, `residual_norm_modulate` loads 25 times two bytes.
    """
    for r in compiled:
        if r["kernel"] not in MEMORY_BOUND or not r["target"].startswith("sm_"):
            continue
        assert r["wide_loads"] >= 1, label(r)
        if not (r["kernel"] == "gate_mix" and r["workload"].startswith("gate_mix_mean")):  # which writes few sums
            assert r["wide_stores"] >= 1, label(r)
        assert r["narrow_accesses"] <= MOST_NARROW.get(r["kernel"], 0), label(r)


def test_capabilities_are_those_of_the_targets() -> None:
    assert [compiled_for(capability) for capability in ((8, 0), (8, 9), (12, 0))] == [True] * 3
    assert [compiled_for(capability) for capability in ((7, 5), (6, 1), (5, 2))] == [False] * 3


def test_table_has_every_call() -> None:
    """Bytes and FLOPs are those of the calls' shapes."""
    least = {r["workload"]: r for r in costs("bf16")}
    assert {w.name for w in workloads(DTYPES["bf16"], "meta")} <= set(least)
    rows = 2560 * 3072 * 2  # text, image and condition rows in bf16
    assert least["residual"]["written"] == rows
    assert rows < least["norm_modulate"]["read"] < 1.02 * rows
    assert least["joint_attention"]["flops"] == 4 * 24 * 128 * 2560**2
    assert least["gate_mix_mean"]["launches"] == 2
    # One image moves as much by the whole mixture a step as by the bank, at a fifth of the kernel's FLOPs.
    assert least["region_expert_mix"]["read"] == pytest.approx(least["gate_mix"]["read"], rel=0.05)
    assert least["region_expert_mix"]["flops"] > 4 * least["gate_mix"]["flops"]


def test_interpreting_and_compiling_exclude_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err
