"""Arguments that launchers refuse, offsets past 2^31, which mixture moves less, and the corrected interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import TensorHandle

from mogle_rt.kernels import stream_rows, stream_rows_kernel
from mogle_rt.kernels.common import LARGEST_ROW, recording
from mogle_rt.kernels.gate_mix import gate_mix_cost
from mogle_rt.kernels.inputs import Experts, Gate
from mogle_rt.kernels.joint_attention import joint_attention, joint_attention_ref
from mogle_rt.kernels.norm_modulate import norm_modulate, norm_modulate_ref
from mogle_rt.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref
from mogle_rt.kernels.region_expert_mix import region_expert_mix_cost
from mogle_rt.kernels.region_experts import region_experts_cost
from mogle_rt.kernels.workloads import tensors, workloads
from tests.conftest import assert_close, in_the_interpreter
from tests.kernels.cases import BY_NAME, CASES, Case, planted, with_tensor
from tests.kernels.interpreter import recorded, rounded, widened

Change = Callable[[Any], Any]


def refused(case: Case, name: str, change: Change, message: str) -> None:
    made = case.arguments(1, torch.float32, **case.small[0])
    before = {n: value.clone() for n, value in tensors(made).items()}
    made = with_tensor(made, name, change(tensors(made)[name] if name in before else made[name]))
    with pytest.raises(ValueError, match=message):
        case.run(**made)
    for n, value in tensors(made).items():
        if n != name:
            assert torch.allclose(value, before[n], rtol=0, atol=0, equal_nan=True), n


@pytest.mark.quick
@in_the_interpreter
@pytest.mark.parametrize(
    ("kernel", "name", "change", "message"),
    [
        ("norm_modulate", "x", lambda x: x.double(), "kernels take torch.float32"),
        ("norm_modulate", "x", lambda x: x[0], r"x must be \[L, B, D\], got \[1, 48\]"),
        ("norm_modulate", "scale", lambda x: x[:1], r"scale must be \[2, 1, 48\], got \[1, 1, 48\]"),
        ("norm_modulate", "shift", lambda x: x.bfloat16(), "shift must be torch.float32 on cpu, got torch.bfloat16"),
        ("norm_modulate", "out", lambda x: x[..., :-1], r"out must be \[37, 1, 53\], got \[37, 1, 52\]"),
        ("norm_modulate", "bounds", lambda x: [20, 12, 37], "bounds must be one to three ascending ends up to 37"),
        ("norm_modulate", "bounds", lambda x: [12, 36], r"up to 37, got \[12, 36\]"),
        ("norm_modulate", "lora_from", lambda x: 38, "must start at position 0 to 37, got 38"),
        ("norm_modulate", "lora_down", lambda x: x.t().contiguous().t(), "unit stride in its last dimension"),
        ("residual", "y", lambda x: x[..., :48], r"y must be \[37, 2, 51\], got \[37, 2, 48\]"),
        (
            "residual",
            "x",
            lambda x: x.clone().transpose(0, 1).contiguous().transpose(0, 1),
            r"x must have stride\(0\) = 2",
        ),
        ("qk_norm_rope", "rope", lambda x: x.half(), "rope must be torch.float32 on cpu, got torch.float16"),
        ("qk_norm_rope", "norm_weight", lambda x: x.repeat(1, 2, 1), "x has 3 parts, norm_weight 4"),
        ("qk_norm_rope", "x", lambda x: x[..., :23], "heads must have an even size up to 512, got 23"),
        ("gate_mix", "bank", lambda x: x[:, :, :-1], r"bank must be \[37, 1, 20, 24\], got \[37, 1, 19, 24\]"),
        ("gate_mix", "gate.time", lambda x: x[:-1], r"time must be \[24\], got \[23\]"),
        ("gate_mix_mean", "sums", lambda x: x.half(), "sums must be torch.float32 on cpu, got torch.float16"),
        ("region_experts", "experts.index", lambda x: x.long(), "index must be torch.int32 on cpu, got torch.int64"),
        ("region_experts", "experts.absent", lambda x: x[:-1], r"absent must be \[21, 20, 24\], got \[20, 20, 24\]"),
        ("region_expert_mix", "experts.planes", lambda x: x[:, :-1], "absent must be|must agree in N, B, C, E"),
        ("joint_attention", "visibility", lambda x: "all", "visibility must be one of joint, separate, .* got 'all'"),
        ("joint_attention", "condition_from", lambda x: 51, "condition_from must be 0 to 50, got 51"),
        (
            "joint_attention",
            "log_scale",
            lambda x: x.double(),
            "log_scale must be torch.float32 on .*, got torch.float64",
        ),
        ("joint_attention", "log_scale", lambda x: x.expand(2), r"log_scale must be \[1\], got \[2\]"),
        ("joint_attention", "v", lambda x: x[:-1], r"v must be \[50, 2, 3, 24\], got \[49, 2, 3, 24\]"),
    ],
)
def test_wrong_arguments_are_refused(kernel: str, name: str, change: Change, message: str) -> None:
    """The error comes before anything is written."""
    refused(BY_NAME[kernel], name, change, message)


def test_wide_rows_are_refused() -> None:
    x = torch.empty(1, 1, LARGEST_ROW + 1, device="meta")
    with recording(), pytest.raises(ValueError, match=f"1 to {LARGEST_ROW} channels, got {LARGEST_ROW + 1}"):
        norm_modulate(x, x, x, [1], x, None, 1)


def test_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mogle_rt.kernels.common.interpreted", lambda: False)
    case = BY_NAME["norm_modulate"]
    with pytest.raises(ValueError, match="Triton kernels need a GPU, got a tensor on cpu"):
        case.run(**case.arguments(1, torch.float32, **case.small[0]))


def far_apart(rows: int, *shape: int) -> Tensor:
    """fp16 rows 2^30 elements apart, so that 32 bits can't hold the third one's offset. Unused pages take no memory."""
    stride = 2**30
    width = int(np.prod(shape))
    x = torch.empty(stride * (rows - 1) + width, dtype=torch.float16)
    strides = torch.empty(shape, device="meta").stride()
    view = x.as_strided((rows, *shape), (stride, *strides))
    return view.copy_(torch.randn(rows, *shape))


@in_the_interpreter
def test_offsets_past_32_bits() -> None:
    L, D = 4, 16
    x, scale, shift = far_apart(L, 1, D), torch.randn(1, 1, D).half(), torch.randn(1, 1, D).half()
    out, expected = torch.empty(L, 1, D + 2).half(), torch.empty(L, 1, D + 2).half()
    down = torch.randn(D, 2).half()
    norm_modulate(x, scale, shift, [L], out, down, 1)
    norm_modulate_ref(x, scale, shift, [L], expected, down, 1)
    assert_close(out, expected, rms=1e-3)
    del x

    qk = far_apart(L, 1, 1, 2, 8)
    weight, rope = torch.ones(1, 1, 8).half(), torch.randn(L, 8)
    copy = qk.clone(memory_format=torch.contiguous_format)
    qk_norm_rope(qk, weight, [L], rope)
    qk_norm_rope_ref(copy, weight, [L], rope)
    assert_close(qk, copy, rms=1e-3)
    del qk

    k = far_apart(L, 1, 1, 16)
    q = torch.randn(L, 1, 1, 16).half()
    out, expected = torch.empty(L, 1, 16).half(), torch.empty(L, 1, 16).half()
    log_scale = torch.tensor([0.3])
    joint_attention(q, k, k, out, 2, "scaled", log_scale)
    joint_attention_ref(q, k, k, expected, 2, "scaled", log_scale)
    assert_close(out, expected, rms=2e-3)


@in_the_interpreter
def test_offsets_of_32_bits_are_caught(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = planted(stream_rows_kernel, "r64 = r.to(tl.int64)", "r64 = r", tmp_path, monkeypatch)
    monkeypatch.setattr(stream_rows, "stream_rows_kernel", faulty.stream_rows_kernel)
    x, scale, out = far_apart(4, 1, 16), torch.ones(1, 1, 16).half(), torch.empty(4, 1, 16).half()
    with pytest.raises(Exception, match="outside of its arguments"), recorded([x, scale], [out]):
        norm_modulate(x, scale, scale, [4], out, None, 4)


NAN_CASES = [c for c in CASES if c.name != "joint_attention"]  # attention may read keys that a row doesn't see


def nan_reaches_outputs(case: Case, device: str) -> None:
    """A NaN in any input reaches the same outputs as in the twin: neither relu nor clipping turns it into a number."""
    spread = 0
    sizes = case.small[0]
    for name, value in tensors(case.arguments(3, torch.float16, device, **sizes)).items():
        if not value.is_floating_point() or name in (*case.scratch, "out", "bank"):
            continue
        mine, twin = (case.arguments(3, torch.float16, device, **sizes) for _ in range(2))
        for made in (mine, twin):
            if "clip" in made:
                made["clip"] = True
            first = tensors(made)[name][(0,) * (value.dim() - 1)]
            first[0] = torch.nan
        case.run(**mine)
        case.reference(**twin)
        for output in case.outputs:
            assert bool(mine[output].isnan()[twin[output].isnan()].all()), (name, output)
            spread += int(twin[output].isnan().sum())
    assert spread > 0


@in_the_interpreter
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("case", NAN_CASES, ids=lambda c: c.name)
def test_nan_is_not_hidden(case: Case) -> None:
    nan_reaches_outputs(case, "cpu")


def test_which_mixture_moves_less() -> None:
    """By counted bytes, the bank moves less for one image, and the whole mixture in one launch for batches."""

    def moved(batch: int, shared: bool) -> tuple[int, int, int]:
        """The bytes of the whole mixture in a step, of the experts, which run once, and of gate and mix in a step."""
        found = {w.name: w.arguments for w in workloads(torch.bfloat16, "meta")}
        gate, experts = found["region_expert_mix"]["gate"], found["region_expert_mix"]["experts"]
        assert isinstance(gate, Gate)
        assert isinstance(experts, Experts)
        P = experts.planes.shape[0]
        N, _, _, _, E = experts.sizes
        index = torch.full((batch, E), -1, dtype=torch.int32)
        for image in range(batch):
            index[image, :P] = torch.arange(P) + (0 if shared else image * P)

        def batched(x: Tensor) -> Tensor:
            return x.expand(N, batch, *x.shape[2:]).contiguous()

        planes = experts.planes if shared else experts.planes.repeat(batch, 1, 1)
        experts = replace(experts, planes=planes, index=index)
        gate = replace(gate, latents=batched(gate.latents), gate_input=batched(gate.gate_input))
        bank = batched(found["region_experts"]["bank"])
        return (
            region_expert_mix_cost(gate, experts, gate.latents).moved,
            region_experts_cost(experts, bank).moved,
            gate_mix_cost(gate, bank, gate.latents).moved,
        )

    whole, _, gate = moved(1, True)
    assert gate < whole < 1.05 * gate
    whole, _, gate = moved(4, False)
    assert whole < 0.75 * gate
    whole, _, gate = moved(4, True)
    assert whole < 0.4 * gate


@pytest.mark.quick
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_recorded_launches_are_as_declared(case: Case) -> None:
    """A call records as many launches as its cost declares."""
    with recording() as launches:
        made = case.arguments(1, torch.bfloat16, **case.small[0])
        case.run(**made)
    assert len(launches) == case.cost(**made).launches
    assert all(n > 0 for launch in launches for n in launch.grid)


@in_the_interpreter
def test_the_interpreters_bfloat16_is_torchs() -> None:
    """Every bit pattern becomes the right fp32 value, and fp32 is rounded to nearest even. NaN stays NaN."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    wide = widened(TensorHandle(bits.numpy(), tl.bfloat16)).data
    expected = bits.view(torch.bfloat16).float()
    np.testing.assert_array_equal(wide, expected.numpy())
    values = torch.cat(
        [torch.randn(100_000) * 10.0 ** torch.randint(-30, 30, (100_000,)), torch.tensor([0.0, torch.inf])]
    )
    narrow = rounded(TensorHandle(values.numpy(), tl.float32)).data
    np.testing.assert_array_equal(narrow, values.bfloat16().view(torch.uint16).numpy())
    assert np.isnan(widened(rounded(TensorHandle(np.array([np.nan], np.float32), tl.float32))).data).all()
