"""The whole mixture in one launch: experts of the present regions, gate, softmax and weighted sum.

Nothing is written but the condition tokens, and nothing is kept between steps but the pictures' latents. Against
`region_experts` once and `gate_mix` every step, a step computes the present experts again, and reads each distinct
picture and absent row once where the bank has one block for every expert and image. Counted for 512 x 512 pixels in
bf16 with 11 pictures a mask: one image 3.1 MB and 114 MFLOP a step against 3.0 MB and 22 MFLOP, so `gate_mix` serves;
four masks 8.6 MB against 12.1, four images of one mask 4.3 MB against 12.1, so this kernel serves batches.
In fp32 its FLOPs weigh more, and it serves large batches of one mask alone. The runtime chooses so for every run.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mogle_rt.kernels.common import KernelCost, check, launch, nbytes, require
from mogle_rt.kernels.experts import (
    check_experts,
    expert_arguments,
    expert_constants,
    expert_flops,
    expert_outputs,
    expert_outputs_ref,
    expert_read,
)
from mogle_rt.kernels.gate import (
    check_gate,
    column,
    gate_arguments,
    gate_constants,
    gate_flops,
    gate_read,
    gate_weights,
    gate_weights_ref,
    mix_bank_ref,
)
from mogle_rt.kernels.inputs import Experts, Gate


@triton.jit
def _region_expert_mix_kernel(
    latents_ptr,  # [N, B, C], and so on: see Gate
    input_ptr,
    time_ptr,
    noise_ptr,
    gate_in_ptr,
    gate_in_bias_ptr,
    gate_out_ptr,
    gate_out_bias_ptr,
    latents_n,
    latents_b,
    input_n,
    input_b,
    noise_stride,
    gate_in_stride,
    gate_out_stride,
    tokens,
    planes_ptr,  # [P, N, C], and so on: see Experts
    index_ptr,
    absent_ptr,
    in_ptr,
    in_bias_ptr,
    out_weight_ptr,
    out_bias_ptr,
    planes_p,
    planes_n,
    index_b,
    absent_n,
    absent_e,
    in_e,
    in_stride,
    in_bias_e,
    out_weight_e,
    out_weight_stride,
    out_bias_e,
    out_ptr,  # [N, B, C]
    out_n,
    out_b,
    C: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    C_BLOCK: tl.constexpr,
    G_BLOCK: tl.constexpr,
    H_BLOCK: tl.constexpr,
    E_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Images vary fastest: programs side by side share rows of `absent`.
    image = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = n < tokens
    weights, _ = gate_weights(
        latents_ptr, input_ptr, time_ptr, noise_ptr, gate_in_ptr, gate_in_bias_ptr, gate_out_ptr, gate_out_bias_ptr,
        latents_n, latents_b, input_n, input_b, noise_stride, gate_in_stride, gate_out_stride,
        n, live, image, C, G, E, C_BLOCK, G_BLOCK, E_BLOCK, PRECISION,
    )  # fmt: skip
    mixed = tl.zeros([ROWS, C_BLOCK], tl.float32)
    for expert in range(E):
        plane = tl.load(index_ptr + image * index_b + expert)
        y = expert_outputs(
            planes_ptr, absent_ptr, in_ptr, in_bias_ptr, out_weight_ptr, out_bias_ptr, planes_p, planes_n,
            absent_n, absent_e, in_e, in_stride, in_bias_e, out_weight_e, out_weight_stride, out_bias_e,
            plane, expert, n, live, C, H, C_BLOCK, H_BLOCK, PRECISION,
        )  # fmt: skip
        mixed += column(weights, expert, E_BLOCK) * y
    c = tl.arange(0, C_BLOCK)
    at = (n * out_n + image * out_b)[:, None] + c[None, :]
    tl.store(out_ptr + at, mixed.to(out_ptr.dtype.element_ty), mask=live[:, None] & (c < C)[None, :])


def region_expert_mix(gate: Gate, experts: Experts, out: Tensor) -> None:
    """`region_experts` and `gate_mix` in one launch: the condition tokens of a step.

    Args:
        gate, experts: inputs and weights; both have the same N, B, C, E and dtype (fp32, fp16 or bf16).
        out: [N, B, C], written.

    Raises:
        ValueError: a shape, dtype, stride or device doesn't fit.
    """
    check_gate(gate)
    check_experts(experts)
    N, B, C, _, E = gate.sizes
    require(
        experts.sizes[:3] == (N, B, C) and experts.sizes[4] == E and experts.planes.dtype == gate.latents.dtype,
        f"gate and experts must agree in N, B, C, E and dtype, got {gate.sizes}, {experts.sizes}",
    )
    check("out", out, (N, B, C), gate.latents)
    if out.numel() == 0:
        return
    constants = gate_constants(gate) | expert_constants(experts)
    launch(
        _region_expert_mix_kernel,
        (B, triton.cdiv(N, constants["ROWS"])),
        *gate_arguments(gate),
        *expert_arguments(experts),
        out,
        *out.stride()[:2],
        **constants,
    )


def region_expert_mix_ref(gate: Gate, experts: Experts, out: Tensor) -> None:
    """`region_expert_mix` in PyTorch."""
    out.copy_(mix_bank_ref(gate_weights_ref(gate), expert_outputs_ref(experts)))


def region_expert_mix_cost(gate: Gate, experts: Experts, out: Tensor) -> KernelCost:
    """What `region_expert_mix` takes at least, by what the index says (so not for captured code)."""
    N, B, C, _, E = gate.sizes
    return KernelCost(
        read=gate_read(gate) + expert_read(experts),
        written=nbytes(out),
        flops=gate_flops(gate) + expert_flops(experts) + 2 * N * B * E * C,
    )
