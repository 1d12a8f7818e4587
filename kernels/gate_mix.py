"""The condition tokens of a step: noise projection, gate, softmax, and the weighted sum of the experts' outputs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mogle_rt.kernels.common import KernelCost, check, launch, nbytes, power_of_two
from mogle_rt.kernels.gate import (
    check_gate,
    gate_arguments,
    gate_constants,
    gate_flops,
    gate_read,
    gate_weights,
    gate_weights_ref,
    mix_bank,
    mix_bank_ref,
    tile_rows,
)
from mogle_rt.kernels.inputs import Gate


@triton.jit
def _gate_mix_kernel(
    latents_ptr,  # [N, B, C]; this and what follows is described in Gate
    input_ptr,
    time_ptr,
    noise_ptr,
    in_ptr,
    in_bias_ptr,
    out_weight_ptr,
    out_bias_ptr,
    latents_n,
    latents_b,
    input_n,
    input_b,
    noise_stride,
    in_stride,
    out_weight_stride,
    tokens,
    bank_ptr,  # [N, B, E, C], unless MEANS
    out_ptr,  # [N, B, C]; with MEANS fp32 [programs, B, E], each program's sum of its tokens' weights
    bank_n,
    bank_b,
    bank_e,
    out_n,
    out_b,
    C: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    C_BLOCK: tl.constexpr,
    G_BLOCK: tl.constexpr,
    E_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    MEANS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = n < tokens
    weights, _ = gate_weights(
        latents_ptr, input_ptr, time_ptr, noise_ptr, in_ptr, in_bias_ptr, out_weight_ptr, out_bias_ptr,
        latents_n, latents_b, input_n, input_b, noise_stride, in_stride, out_weight_stride,
        n, live, image, C, G, E, C_BLOCK, G_BLOCK, E_BLOCK, PRECISION,
    )  # fmt: skip
    if MEANS:
        e = tl.arange(0, E_BLOCK)
        sums = tl.sum(tl.where(live[:, None], weights, 0.0), axis=0)
        tl.store(out_ptr + tl.program_id(0) * out_n + image * out_b + e, sums, mask=e < E)
    else:
        mixed = mix_bank(weights, bank_ptr, bank_n, bank_b, bank_e, n, live, image, C, E, C_BLOCK, E_BLOCK, ROWS)
        c = tl.arange(0, C_BLOCK)
        at = (n * out_n + image * out_b)[:, None] + c[None, :]
        tl.store(out_ptr + at, mixed.to(out_ptr.dtype.element_ty), mask=live[:, None] & (c < C)[None, :])


@triton.jit
def _mean_mix_kernel(
    sums_ptr,  # fp32 [programs, B, E]
    bank_ptr,  # [N, B, E, C]
    out_ptr,  # [N, B, C]
    tokens,
    programs,
    sums_p,
    sums_b,
    bank_n,
    bank_b,
    bank_e,
    out_n,
    out_b,
    C: tl.constexpr,
    E: tl.constexpr,
    C_BLOCK: tl.constexpr,
    E_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Mix with mean weights. Every program adds up all sums in the same order, so all get the same weights."""
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = n < tokens
    e = tl.arange(0, E_BLOCK)
    total = tl.zeros([E_BLOCK], tl.float32)
    for first in range(0, programs, SUMS):
        p = first + tl.arange(0, SUMS)
        mask = (p < programs)[:, None] & (e < E)[None, :]
        total += tl.sum(
            tl.load(sums_ptr + (p * sums_p + image * sums_b)[:, None] + e[None, :], mask=mask, other=0.0), 0
        )
    weights = (total / tokens)[None, :]
    mixed = mix_bank(weights, bank_ptr, bank_n, bank_b, bank_e, n, live, image, C, E, C_BLOCK, E_BLOCK, ROWS)
    c = tl.arange(0, C_BLOCK)
    at = (n * out_n + image * out_b)[:, None] + c[None, :]
    tl.store(out_ptr + at, mixed.to(out_ptr.dtype.element_ty), mask=live[:, None] & (c < C)[None, :])


def gate_mix(gate: Gate, bank: Tensor, out: Tensor) -> None:
    """out = sum over e of softmax(gate)_e * bank[:, :, e] (MoGLE, arXiv 2509.00428).

    Args:
        gate: the gate's inputs and weights, in fp32, fp16 or bf16.
        bank: [N, B, E, C], the experts' outputs, in the gate's dtype.
        out: [N, B, C], written.

    Raises:
        ValueError: a shape, dtype, stride or device doesn't fit.
    """
    check_gate(gate)
    N, B, C, _, E = gate.sizes
    check("bank", bank, (N, B, E, C), gate.latents)
    check("out", out, (N, B, C), gate.latents)
    if N * B == 0:
        return
    constants = gate_constants(gate)
    launch(
        _gate_mix_kernel,
        (triton.cdiv(N, constants["ROWS"]), B),
        *gate_arguments(gate),
        bank,
        out,
        *bank.stride()[:3],
        *out.stride()[:2],
        MEANS=False,
        **constants,
    )


def gate_mix_ref(gate: Gate, bank: Tensor, out: Tensor) -> None:
    """`gate_mix` by PyTorch."""
    out.copy_(mix_bank_ref(gate_weights_ref(gate), bank))


def gate_mix_cost(gate: Gate, bank: Tensor, out: Tensor) -> KernelCost:
    """The least that `gate_mix` takes: it reads the bank once."""
    return KernelCost(
        read=gate_read(gate) + nbytes(bank), written=nbytes(out), flops=gate_flops(gate) + 2 * bank.numel()
    )


def partial_sums(bank: Tensor) -> int:
    """How many rows the scratch buffer of `gate_mix_mean` must have for a bank [N, B, E, C]."""
    N, B = bank.shape[:2]
    return triton.cdiv(N, tile_rows(N, B, bank.dtype))


def gate_mix_mean(gate: Gate, bank: Tensor, sums: Tensor, out: Tensor) -> None:
    """`gate_mix` with the weights averaged over the tokens of each image (weight_is_scale), in two launches.

    Args:
        sums: fp32 [`partial_sums` (bank), B, E], a scratch buffer that is written. All others are as in `gate_mix`.

    Raises:
        ValueError: a shape, dtype, stride or device doesn't fit.
    """
    check_gate(gate)
    N, B, C, _, E = gate.sizes
    check("bank", bank, (N, B, E, C), gate.latents)
    programs = partial_sums(bank)
    check("out", out, (N, B, C), gate.latents)
    check("sums", sums, (programs, B, E), gate.latents, torch.float32)
    if N * B == 0:
        return
    constants = gate_constants(gate)
    launch(
        _gate_mix_kernel,
        (programs, B),
        *gate_arguments(gate),
        bank,
        sums,
        *bank.stride()[:3],
        *sums.stride()[:2],
        MEANS=True,
        **constants,
    )
    launch(
        _mean_mix_kernel,
        (programs, B),
        sums,
        bank,
        out,
        N,
        programs,
        *sums.stride()[:2],
        *bank.stride()[:3],
        *out.stride()[:2],
        SUMS=min(power_of_two(programs), 32),
        **{name: constants[name] for name in ("C", "E", "C_BLOCK", "E_BLOCK", "ROWS")},
    )


def gate_mix_mean_ref(gate: Gate, bank: Tensor, sums: Tensor, out: Tensor) -> None:
    """`gate_mix_mean` by PyTorch; the sums over all tokens are put into the first row of ``sums``."""
    weights = gate_weights_ref(gate)
    sums.zero_()[0] = weights.sum(0)
    out.copy_(mix_bank_ref(weights.mean(0, keepdim=True), bank))


def gate_mix_mean_cost(gate: Gate, bank: Tensor, sums: Tensor, out: Tensor) -> KernelCost:
    """The least that `gate_mix_mean` takes: it reads the bank once, and writes and reads the sums once."""
    return KernelCost(
        read=gate_read(gate) + nbytes(bank, sums),
        written=nbytes(out, sums),
        flops=gate_flops(gate) + 2 * bank.numel(),
        launches=2,
    )
