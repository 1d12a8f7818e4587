"""The whole mixture in one launch: the experts of the present regions, the gate, the softmax and the weighted sum.

It writes only the condition tokens, and between steps it keeps only the latents of the pictures. The other way is to run
`region_experts` once and `gate_mix` in every step. Compared with that, this kernel computes the present experts again in
every step, but it reads each distinct picture and each absent row once, while the bank holds a block for every expert and
image.

These are the counts for a step at 512 x 512 pixels in bf16 with 11 pictures a mask. One image takes 3.1 MB and 114 MFLOP
here, and 3.0 MB and 22 MFLOP with `gate_mix`, which is then better. Four masks take 8.6 MB here and 12.1 MB with the bank;
four images of one mask take 4.3 MB and 12.1 MB. So this kernel is better for batches. In fp32 its FLOPs weigh more, and
it is better only for large batches of one mask. The runtime makes this choice for every run.
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
    latents_ptr,  # [N, B, C]; this and what follows is described in Gate
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
    planes_ptr,  # [P, N, C]; this and what follows is described in Experts
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
    # The image varies fastest, so that neighbouring programs share rows of `absent`.
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
    """`region_expert_mix` by PyTorch."""
    out.copy_(mix_bank_ref(gate_weights_ref(gate), expert_outputs_ref(experts)))


def region_expert_mix_cost(gate: Gate, experts: Experts, out: Tensor) -> KernelCost:
    """The least that `region_expert_mix` takes. It reads the index, so it can't be called while a graph is captured."""
    N, B, C, _, E = gate.sizes
    return KernelCost(
        read=gate_read(gate) + expert_read(experts),
        written=nbytes(out),
        flops=gate_flops(gate) + expert_flops(experts) + 2 * N * B * E * C,
    )
