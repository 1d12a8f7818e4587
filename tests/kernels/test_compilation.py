"""The machine code that compilers make of every kernel, for GPUs that this machine needn't have.

`tests.kernels.compiled` compiles the kernels once for all tests here. It has a process of its own, since in this one
Triton may be set to interpret kernels. Its table is kept in build/ until anything changes that it depends on.
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
from tests.kernels.compiled import FEW_BITS, GENERATIONS, OF_ONE_GENERATION, SAME_CODE

# The kernels without a matrix product, and those whose tiles are large enough for the newer instructions: wgmma and
# tcgen05 need 64 rows. The other kernels have tiles of 16 rows: with few tokens, larger ones would leave most
# multiprocessors idle, or the product is only a thin one beside a norm.
WITHOUT_PRODUCT = {"qk_norm_rope", "mean_mix"}
LARGE_TILES = {"region_experts", "joint_attention"}
MEMORY_BOUND = {"stream_rows", "qk_norm_rope", "gate_mix", "mean_mix", "region_experts", "region_expert_mix"}
OWN_INSTRUCTION = {"sm_90": "wgmma", "sm_100": "tcgen05"}
# How many accesses of two bytes a kernel may have; others may have none. A program over the residual stream has 16 rows.
# Its threads read a branch of 16 columns an element each, and write the branch's results as tensor cores hold them.
# qk_norm_rope's 128 threads read a weight each of a head's norms (of q and of k).
MOST_NARROW = {"stream_rows": 3, "qk_norm_rope": 2}
# The tensor cores that products of weights of few bits use. On Blackwell, Triton multiplies int8 with the instructions of
# older GPUs.
CORES = {
    "scaled_linear-int8": {"sm_80": "mma s8", "sm_90": "wgmma s8", "sm_100": "mma s8"},
    "scaled_linear-fp8": {"sm_89": "mma e4m3", "sm_90": "wgmma e4m3", "sm_100": "tcgen05 e4m3"},
    "int4_linear": {"sm_89": "mma", "sm_90": "wgmma", "sm_120": "mma"},
}

Compiled = list[dict[str, Any]]
ROOT = Path(__file__).parents[2]


def sources_hash() -> str:
    """A hash of what the table depends on: the kernels, the calls that are compiled, and the compilers' versions."""
    versions = [platform.python_version(), *(importlib.metadata.version(name) for name in ("torch", "triton"))]
    found = hashlib.sha256(" ".join(versions).encode())
    for path in (*sorted((ROOT / "kernels").glob("*.py")), ROOT / "tests" / "kernels" / "compiled.py"):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


@pytest.fixture(scope="module")
def table() -> Compiled:
    """All tests share one, also those that run side by side in other processes."""
    path = make_once(ROOT / "build" / "compiled" / f"{sources_hash()}.json", compile_all)
    found: Compiled = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def compiled(table: Compiled) -> Compiled:
    """The part of the table that is about plain weights."""
    return [r for r in table if r["workload"] not in dict(FEW_BITS)]


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
    """No registers spill, and the shared memory is there on every GPU with this code."""
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
    """So the other tests need to look at one GPU of each generation only."""
    assert {*GENERATIONS, *(other for others in SAME_CODE.values() for other in others)} == set(TARGETS)
    rows = {r["target"]: r for r in compiled if r["workload"] == OF_ONE_GENERATION and r["dtype"] == "bf16"}
    for target, others in SAME_CODE.items():
        for other in others:
            assert rows[other] | {"target": target} == rows[target], other


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_products_are_on_tensor_cores(compiled: Compiled) -> None:
    """Where a tile is large enough, they use wgmma on Hopper and tcgen05 on Blackwell."""
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
    """Rows are. Accesses of two bytes are counted: there Triton can't tell that the row stride is aligned.

    With ranks filled up to 8 in place of 16, `residual_norm_modulate` has 25 loads of two bytes.
    """
    for r in compiled:
        if r["kernel"] not in MEMORY_BOUND or not r["target"].startswith("sm_"):
            continue
        assert r["wide_loads"] >= 1, label(r)
        if not (r["kernel"] == "gate_mix" and r["workload"].startswith("gate_mix_mean")):  # this one writes few sums
            assert r["wide_stores"] >= 1, label(r)
        assert r["narrow_accesses"] <= MOST_NARROW.get(r["kernel"], 0), label(r)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_weights_of_few_bits(table: Compiled) -> None:
    """Products use the right tensor cores, no registers spill, shared memory suffices, and rows move 16 bytes at a time."""
    rows = [r for r in table if r["workload"] in dict(FEW_BITS)]
    assert len(rows) == len(FEW_BITS)
    for r in rows:
        assert r["spills"] == 0, label(r)
        assert r["shared"] <= SHARED_LIMITS[r["target"]], label(r)
        if r["target"].startswith("gfx"):
            continue
        assert r["wide_loads"] >= 1, label(r)
        assert r["wide_stores"] >= 1, label(r)
        # int4 loads one scale of two bytes for each of a tile's columns that a thread holds.
        assert r["narrow_accesses"] <= (8 if r["workload"] == "int4_linear" else 0), label(r)
        cores = CORES.get(r["workload"].removesuffix("-gelu"))
        assert r["tensor_cores"] == ("" if cores is None else cores[r["target"]]), label(r)


def test_capabilities_are_those_of_the_targets() -> None:
    assert [compiled_for(capability) for capability in ((8, 0), (8, 9), (12, 0))] == [True] * 3
    assert [compiled_for(capability) for capability in ((7, 5), (6, 1), (5, 2))] == [False] * 3


def test_table_has_every_call() -> None:
    """The table of the command line has a row for every call, and its bytes and FLOPs follow from the calls' shapes."""
    least = {r["workload"]: r for r in costs("bf16")}
    assert {w.name for w in workloads(DTYPES["bf16"], "meta")} <= set(least)
    rows = 2560 * 3072 * 2  # text, image and condition rows in bf16
    assert least["residual"]["written"] == rows
    assert rows < least["norm_modulate"]["read"] < 1.02 * rows
    assert least["joint_attention"]["flops"] == 4 * 24 * 128 * 2560**2
    assert least["gate_mix_mean"]["launches"] == 2
    # For one image, the whole mixture reads as many bytes a step as gate and bank do, which take a quarter of its FLOPs.
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
