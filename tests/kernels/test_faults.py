"""Faults planted in kernels' sources are caught by the twin, by the check of bounds, or by the count of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mogle_rt.kernels import (
    experts,
    gate,
    gate_mix,
    joint_attention,
    qk_norm_rope,
    region_experts,
    stream_rows,
    stream_rows_kernel,
)
from tests.conftest import in_the_interpreter
from tests.kernels.cases import BY_NAME, planted
from tests.kernels.interpreter import recorded
from tests.kernels.test_kernels import check

pytestmark = in_the_interpreter


# By the fault's name: the case, the module with the fault, its source before and after, and the kernel that is replaced.
WRONG_RESULTS = {
    "wrong stride": ("norm_modulate", stream_rows_kernel, "r64 * out_stride", "r64 * x_stride", "stream_rows_kernel"),
    "group off by one": (
        "norm_modulate",
        stream_rows_kernel,
        "position >= end0",
        "position > end0",
        "stream_rows_kernel",
    ),
    "branch off by one": ("norm_modulate", stream_rows_kernel, "r >= down_from", "r > down_from", "stream_rows_kernel"),
    "up-projection off by one": ("residual", stream_rows_kernel, "r >= up_from", "r > up_from", "stream_rows_kernel"),
    "mean of padding": ("norm_modulate", stream_rows_kernel, "axis=1) / D", "axis=1) / D_BLOCK", "stream_rows_kernel"),
    "sign of the rotation": (
        "qk_norm_rope",
        qk_norm_rope,
        "cos - odd * sin",
        "cos + odd * sin",
        "_qk_norm_rope_kernel",
    ),
    "last heads unwritten": ("qk_norm_rope", qk_norm_rope, "(h < H)", "(h < H - 1)", "_qk_norm_rope_kernel"),
    "softmax over padding": (
        "gate_mix",
        gate,
        '(e < E)[None, :], logits, float("-inf")',
        "(e < E)[None, :], logits, 0.0",
        "gate_weights",
    ),
    "last expert left out": ("gate_mix", gate, "static_range(E)", "static_range(E - 1)", "mix_bank"),
    "off-by-one expert's weight": ("gate_mix", gate, "== number)", "== number + 1)", "mix_bank"),
    "off-by-one expert's parameters": (
        "region_experts",
        experts,
        "in_ptr + expert * in_e",
        "in_ptr + (expert - (expert > 0)) * in_e",
        "expert_outputs",
    ),
    "first plane counted as absent": ("region_experts", experts, "plane >= 0", "plane > 0", "expert_outputs"),
    "wrong group's bias": (
        "joint_attention",
        joint_attention,
        "row >= condition_from",
        "row > condition_from",
        "_joint_attention_kernel",
    ),
    "keys past the end": (
        "joint_attention",
        joint_attention,
        "key < stop",
        "key < stop - 1",
        "_joint_attention_kernel",
    ),
}
RUNS = {
    "stream_rows_kernel": stream_rows,
    "gate_weights": gate_mix,
    "mix_bank": gate_mix,
    "expert_outputs": region_experts,
}


@pytest.mark.parametrize("fault", WRONG_RESULTS)
def test_wrong_results_are_caught(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, module, old, new, function = WRONG_RESULTS[fault]
    case = BY_NAME[name]
    check(case, case.small[0], torch.float32, "cpu", 7)
    faulty = planted(module, old, new, tmp_path, monkeypatch)
    monkeypatch.setattr(RUNS.get(function, module), function, getattr(faulty, function))
    with pytest.raises(AssertionError):
        check(case, case.small[0], torch.float32, "cpu", 7)


OUT_OF_BOUNDS = {
    "missing mask of rows": (
        "norm_modulate",
        stream_rows_kernel,
        "live = r < rows",
        "live = r < rows + 1",
        "stream_rows_kernel",
    ),
    "missing mask of columns": (
        "norm_modulate",
        stream_rows_kernel,
        "(cols < D)[None, :]",
        "(cols < D + 1)[None, :]",
        "stream_rows_kernel",
    ),
    "missing mask of channels": (
        "qk_norm_rope",
        qk_norm_rope,
        "(cols < 2 * HALF)[None, :]",
        "(cols < 2 * HALF + 1)[None, :]",
        "_qk_norm_rope_kernel",
    ),
    "wrong stride": (
        "qk_norm_rope",
        qk_norm_rope,
        "r.to(tl.int64) * x_stride",
        "r.to(tl.int64) * (2 * x_stride)",
        "_qk_norm_rope_kernel",
    ),
    "missing mask of tokens": ("gate_mix", gate_mix, "live = n < tokens", "live = n >= 0", "_gate_mix_kernel"),
    "off-by-one expert": ("gate_mix", gate, "number * bank_e", "(number + 1) * bank_e", "mix_bank"),
    "off-by-one index": (
        "region_experts",
        region_experts,
        "image * index_b + expert",
        "image * index_b + expert + 1",
        "_region_experts_kernel",
    ),
    "plane past the last": (
        "region_experts",
        experts,
        "plane.to(tl.int64) *",
        "(plane.to(tl.int64) + 1) *",
        "expert_outputs",
    ),
    "missing mask of keys": (
        "joint_attention",
        joint_attention,
        "key_live = key < stop",
        "key_live = key < stop + 1",
        "_joint_attention_kernel",
    ),
}


@pytest.mark.parametrize("fault", OUT_OF_BOUNDS)
def test_reaching_out_of_bounds_is_caught(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, module, old, new, function = OUT_OF_BOUNDS[fault]
    case = BY_NAME[name]
    faulty = planted(module, old, new, tmp_path, monkeypatch)
    made = case.arguments(7, torch.float32, **case.small[0])
    monkeypatch.setattr(RUNS.get(function, module), function, getattr(faulty, function))
    with pytest.raises(Exception, match="outside of its arguments"), recorded(*case.views(made)):
        case.run(**made)


@pytest.mark.parametrize("planted_fault", [False, True])
def test_reading_more_than_declared_is_caught(
    planted_fault: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault: a residual reads the branch's columns for all rows of its tile, and not for the branch's rows only."""
    case = BY_NAME["residual_norm_modulate"]
    # Rows from 20 on have a branch of the norm, and share a tile; those from 23 on also have one of the residual.
    made = case.arguments(7, torch.float32, **case.small[0])
    if planted_fault:
        branch, every = "(live & (r >= up_from))[:, None] & (q", "live[:, None] & (q"
        faulty = planted(stream_rows_kernel, branch, every, tmp_path, monkeypatch)
        monkeypatch.setattr(stream_rows, "stream_rows_kernel", faulty.stream_rows_kernel)
    with recorded(*case.views(made)) as traffic:
        case.run(**made)
    assert (traffic.bytes_read > case.cost(**made).read) is planted_fault


def test_reading_less_than_declared_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault: a norm never reads the third group's rows of its tables."""
    case = BY_NAME["norm_modulate"]
    faulty = planted(stream_rows_kernel, "position >= end1", "position >= end1 + 1000", tmp_path, monkeypatch)
    monkeypatch.setattr(stream_rows, "stream_rows_kernel", faulty.stream_rows_kernel)
    sizes: dict[str, Any] = {"L": 30, "B": 1, "D": 16, "R": 0, "G": 3, "lora_from": 30}
    made = case.arguments(7, torch.float32, **sizes)
    with recorded(*case.views(made)) as traffic:
        case.run(**made)
    assert traffic.bytes_read < case.cost(**made).read
