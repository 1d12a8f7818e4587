"""What compilers make of every kernel for GPUs that needn't be there, read back from the machine code.

Compiled by `python -m mogle_rt.kernels --json` in a process of its own, since this one may interpret.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from mogle_rt.kernels.chips import SHARED_LIMITS, TARGETS
from mogle_rt.kernels.workloads import variants

# Kernels without a matrix product, and where a product's tile is as large as the newer instructions need: 64 rows for
# wgmma and tcgen05. The others have 16 rows, since few tokens would otherwise leave most multiprocessors idle, or
# since the product is a thin one beside a norm.
WITHOUT_PRODUCT = {"qk_norm_rope", "mean_mix"}
LARGE_TILES = {"region_experts", "joint_attention"}
MEMORY_BOUND = {"stream_rows", "qk_norm_rope", "gate_mix", "mean_mix", "region_experts", "region_expert_mix"}
OWN_INSTRUCTION = {"sm_90": "wgmma", "sm_100": "tcgen05"}

Compiled = list[dict[str, Any]]


def compile_all(*arguments: str) -> dict[str, Any]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "mogle_rt.kernels", "--json", "--compile-only", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode in (0, 1), done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def bf16() -> dict[str, Any]:
    return compile_all("--dtype", "bf16")


@pytest.fixture(scope="module")
def compiled(bf16: dict[str, Any]) -> Compiled:
    others = [w.name for w in variants(torch.bfloat16)]
    return [
        *bf16["compiled"],
        *compile_all("--dtype", "fp32", "--target", "sm_80", "sm_90")["compiled"],
        *compile_all("--kernel", *others, "--dtype", "bf16", "fp32", "--target", "sm_90")["compiled"],
    ]


def label(r: dict[str, Any]) -> str:
    return f"{r['workload']}: {r['kernel']} in {r['dtype']} on {r['target']}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_kernel_compiles_for_every_gpu_within_its_limits(compiled: Compiled) -> None:
    """No register spills, and shared memory fits."""
    kernels = {r["kernel"] for r in compiled}
    assert len(kernels) == 8  # stream_rows is launched in three ways
    for target in TARGETS:
        assert {r["kernel"] for r in compiled if r["target"] == target} == kernels
    for r in compiled:
        assert r["spills"] == 0, label(r)
        assert r["shared"] <= SHARED_LIMITS[r["target"]], label(r)


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
    for r in compiled:
        if r["kernel"] not in MEMORY_BOUND or not r["target"].startswith("sm_"):
            continue
        assert r["wide_loads"] >= 1, label(r)
        if not (r["kernel"] == "gate_mix" and r["workload"].startswith("gate_mix_mean")):  # which writes few sums
            assert r["wide_stores"] >= 1, label(r)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_table_has_every_call(bf16: dict[str, Any]) -> None:
    """Bytes and FLOPs are those of the calls' shapes."""
    least = {r["workload"]: r for r in bf16["least"]}
    assert set(least) == {r["workload"] for r in bf16["compiled"]}
    rows = 2560 * 3072 * 2  # text, image and condition rows in bf16
    assert least["residual"]["written"] == rows
    assert rows < least["norm_modulate"]["read"] < 1.02 * rows
    assert least["joint_attention"]["flops"] == 4 * 24 * 128 * 2560**2
    assert least["gate_mix_mean"]["launches"] == 2
    # One image moves as much by the whole mixture a step as by the bank, at a fifth of the kernel's FLOPs.
    assert least["region_expert_mix"]["read"] == pytest.approx(least["gate_mix"]["read"], rel=0.05)
    assert least["region_expert_mix"]["flops"] > 4 * least["gate_mix"]["flops"]


@pytest.mark.slow
def test_interpreting_and_compiling_exclude_each_other() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "mogle_rt.kernels"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_table_for_people() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "COLUMNS": "200"}
    command = [sys.executable, "-m", "mogle_rt.kernels", "--kernel", "qk_norm_rope", "--target", "sm_90"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    for word in ("registers", "spills", "shared", "stack", "16-byte loads + stores", "MB read", "qk_norm_rope"):
        assert word in done.stdout
