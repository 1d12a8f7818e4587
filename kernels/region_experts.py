"""All region experts of all images in one launch. It runs once before the loop and makes the bank that each step mixes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mogle_rt.kernels.common import KernelCost, check, interpreted, launch, nbytes, power_of_two
from mogle_rt.kernels.experts import (
    check_experts,
    expert_arguments,
    expert_constants,
    expert_flops,
    expert_outputs,
    expert_outputs_ref,
    expert_read,
)
from mogle_rt.kernels.inputs import Experts


def tile_rows(tokens: int) -> int:
    """How many tokens a program computes: 64, the height of Hopper's matrix instruction. 20 experts give enough programs."""
    return min(power_of_two(tokens, 16), 1024 if interpreted() else 64)


@triton.jit
def _region_experts_kernel(
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
    bank_ptr,  # [N, B, E, C]
    tokens,
    bank_n,
    bank_b,
    bank_e,
    C: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    C_BLOCK: tl.constexpr,
    H_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The expert varies fastest, so that neighbouring programs write to neighbouring memory.
    expert = (tl.program_id(0) % E).to(tl.int64)
    image = tl.program_id(1).to(tl.int64)
    n = (tl.program_id(0) // E).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = n < tokens
    plane = tl.load(index_ptr + image * index_b + expert)
    y = expert_outputs(
        planes_ptr, absent_ptr, in_ptr, in_bias_ptr, out_weight_ptr, out_bias_ptr, planes_p, planes_n,
        absent_n, absent_e, in_e, in_stride, in_bias_e, out_weight_e, out_weight_stride, out_bias_e,
        plane, expert, n, live, C, H, C_BLOCK, H_BLOCK, PRECISION,
    )  # fmt: skip
    c = tl.arange(0, C_BLOCK)
    at = (n * bank_n)[:, None] + image * bank_b + expert * bank_e + c[None, :]
    tl.store(bank_ptr + at, y.to(bank_ptr.dtype.element_ty), mask=live[:, None] & (c < C)[None, :])


def region_experts(experts: Experts, bank: Tensor) -> None:
    """bank[:, b, e] = expert e of planes[index[b, e]], or absent[:, e] where the index is -1.

    An expert is Linear(relu(Linear(x))) (MoGLE, arXiv 2509.00428). The same kernel also makes ``absent``: it is
    ``bank[:, 0]`` of a call whose only plane is the black picture and whose index is all zeros, [1, E].

    Args:
        experts: inputs and weights, in fp32, fp16 or bf16. Rows of ``absent`` are read only where an index is -1. The
            index itself is not checked, because that would need a copy to the host.
        bank: [N, B, E, C], written.

    Raises:
        ValueError: a shape, dtype, stride or device doesn't fit.
    """
    check_experts(experts)
    N, B, C, _, E = experts.sizes
    check("bank", bank, (N, B, E, C), experts.planes)
    if bank.numel() == 0:
        return
    tile = tile_rows(N)
    launch(
        _region_experts_kernel,
        (triton.cdiv(N, tile) * E, B),
        *expert_arguments(experts),
        bank,
        N,
        *bank.stride()[:3],
        ROWS=tile,
        **expert_constants(experts),
    )


def region_experts_ref(experts: Experts, bank: Tensor) -> None:
    """`region_experts` by PyTorch."""
    bank.copy_(expert_outputs_ref(experts))


def region_experts_cost(experts: Experts, bank: Tensor) -> KernelCost:
    """The least that `region_experts` takes. It reads the index, so it can't be called while a graph is captured."""
    return KernelCost(read=expert_read(experts), written=nbytes(bank), flops=expert_flops(experts))
