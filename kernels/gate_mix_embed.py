"""`gate_mix` that goes on through x_embedder with its LoRA: from latents to the transformer's rows in one launch.

The rows of the latents go through the same product, so neither the condition tokens nor a joined input is written.

The runtime doesn't take it. Counted for 512 x 512 pixels in bf16, it would save 3 of a step's 511 launches and 13 MB
of its 44 GB, 0.03 %; and its programs of 16 tokens would each read the whole of x_embedder's weight, 25 MB through the
cache, where cuBLAS reads it once a large tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mogle_rt.kernels.common import Cost, check, interpreted, launch, nbytes, power_of_two, require
from mogle_rt.kernels.gate import WIDER_THAN_TALL, Gate, gate_weights, load_transposed, mix_bank, mix_bank_ref


def embed_channels(width: int, dtype: torch.dtype) -> int:
    """Output channels of a step: what the registers allow, fp32 taking three products."""
    if interpreted():
        return power_of_two(width)
    return 64 if dtype == torch.float32 else 128


@triton.jit
def _gate_mix_embed_kernel(
    latents_ptr,  # [N, B, C], and so on: see Gate
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
    bank_ptr,  # [N, B, E, C]
    embed_ptr,  # [D, C]
    embed_bias_ptr,  # [D]
    down_ptr,  # [C, R]
    up_ptr,  # [R, D]
    out_ptr,  # [2 N, B, D]
    width,  # D
    bank_n,
    bank_b,
    bank_e,
    embed_stride,
    down_stride,
    up_stride,
    out_n,
    out_b,
    C: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    C_BLOCK: tl.constexpr,
    G_BLOCK: tl.constexpr,
    E_BLOCK: tl.constexpr,
    R_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LATENT_LORA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype = latents_ptr.dtype.element_ty
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = n < tokens
    weights, latents = gate_weights(
        latents_ptr, input_ptr, time_ptr, noise_ptr, in_ptr, in_bias_ptr, out_weight_ptr, out_bias_ptr,
        latents_n, latents_b, input_n, input_b, noise_stride, in_stride, out_weight_stride,
        n, live, image, C, G, E, C_BLOCK, G_BLOCK, E_BLOCK, PRECISION,
    )  # fmt: skip
    mixed = mix_bank(weights, bank_ptr, bank_n, bank_b, bank_e, n, live, image, C, E, C_BLOCK, E_BLOCK, ROWS)
    mixed = mixed.to(dtype)
    c, k = tl.arange(0, C_BLOCK), tl.arange(0, R_BLOCK)
    if R > 0:
        down_mask = (c < C)[:, None] & (k < R)[None, :]
        down = tl.load(down_ptr + (c * down_stride)[:, None] + k[None, :], mask=down_mask, other=0.0)
        low = tl.dot(mixed, down, input_precision=PRECISION).to(dtype)
        if LATENT_LORA:
            low_latents = tl.dot(latents, down, input_precision=PRECISION).to(dtype)
    image_at = (n * out_n + image * out_b)[:, None]
    condition_at = ((tokens + n) * out_n + image * out_b)[:, None]
    for first in range(0, width, D_BLOCK):
        cols = first + tl.arange(0, D_BLOCK)
        embed = load_transposed(embed_ptr, embed_stride, c, cols, C, width)
        bias = tl.load(embed_bias_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
        bias = tl.broadcast_to(bias[None, :], [ROWS, D_BLOCK])
        of_image = tl.dot(latents, embed, acc=bias, input_precision=PRECISION)
        of_condition = tl.dot(mixed, embed, acc=bias, input_precision=PRECISION)
        if R > 0:
            up_mask = (k < R)[:, None] & (cols < width)[None, :]
            up = tl.load(up_ptr + (k * up_stride)[:, None] + cols[None, :], mask=up_mask, other=0.0)
            of_condition = tl.dot(low, up, acc=of_condition, input_precision=PRECISION)
            if LATENT_LORA:
                of_image = tl.dot(low_latents, up, acc=of_image, input_precision=PRECISION)
        mask = live[:, None] & (cols < width)[None, :]
        tl.store(out_ptr + image_at + cols[None, :], of_image.to(dtype), mask=mask)
        tl.store(out_ptr + condition_at + cols[None, :], of_condition.to(dtype), mask=mask)


def gate_mix_embed(
    latents: Tensor,
    gate_input: Tensor,
    time: Tensor,
    noise_weight: Tensor,
    gate_in_weight: Tensor,
    gate_in_bias: Tensor,
    gate_out_weight: Tensor,
    gate_out_bias: Tensor,
    bank: Tensor,
    embed_weight: Tensor,
    embed_bias: Tensor,
    lora_down: Tensor | None,
    lora_up: Tensor | None,
    latent_lora: bool,
    out: Tensor,
) -> None:
    """out[:N] = latents W^T + b, out[N:] = mixed W^T + b + mixed A B, with mixed from `gate_mix`.

    Args: those of `gate_mix` up to ``bank``, then
        embed_weight: [D, C] (W) and embed_bias: [D].
        lora_down: [C, R] (A) and lora_up: [R, D] (B), or None both.
        latent_lora: the branch acts on the latents' rows as well.
        out: [2 N, B, D], written.

    Raises:
        ValueError: a shape, dtype, stride or device doesn't fit.
    """
    gate = Gate(latents, gate_input, time, noise_weight, gate_in_weight, gate_in_bias, gate_out_weight, gate_out_bias)
    gate.check()
    N, B, C, _, E = gate.sizes
    D = embed_weight.shape[0]
    check("bank", bank, (N, B, E, C), latents)
    check("embed_weight", embed_weight, (D, C), latents)
    check("embed_bias", embed_bias, (D,), latents)
    check("out", out, (2 * N, B, D), latents)
    require((lora_down is None) == (lora_up is None), "lora_down and lora_up come together")
    R, down, up = 0, latents, latents
    if lora_down is not None and lora_up is not None:
        R, down, up = lora_down.shape[1], lora_down, lora_up
        check("lora_down", down, (C, R), latents)
        check("lora_up", up, (R, D), latents)
    if out.numel() == 0:
        return
    constants = gate.constants()
    launch(
        _gate_mix_embed_kernel,
        (triton.cdiv(N, constants["ROWS"]), B),
        *gate.arguments(),
        bank,
        embed_weight,
        embed_bias,
        down,
        up,
        out,
        D,
        *bank.stride()[:3],
        embed_weight.stride(0),
        down.stride(0),
        up.stride(0),
        *out.stride()[:2],
        R=R,
        R_BLOCK=power_of_two(R, WIDER_THAN_TALL),
        D_BLOCK=min(power_of_two(D, WIDER_THAN_TALL), embed_channels(D, latents.dtype)),
        LATENT_LORA=latent_lora,
        num_warps=8,
        num_stages=2,
        **constants,
    )


def gate_mix_embed_ref(
    latents: Tensor,
    gate_input: Tensor,
    time: Tensor,
    noise_weight: Tensor,
    gate_in_weight: Tensor,
    gate_in_bias: Tensor,
    gate_out_weight: Tensor,
    gate_out_bias: Tensor,
    bank: Tensor,
    embed_weight: Tensor,
    embed_bias: Tensor,
    lora_down: Tensor | None,
    lora_up: Tensor | None,
    latent_lora: bool,
    out: Tensor,
) -> None:
    """`gate_mix_embed` in PyTorch, in fp32 (fp64 for fp64); what is rounded apart is rounded here."""
    gate = Gate(latents, gate_input, time, noise_weight, gate_in_weight, gate_in_bias, gate_out_weight, gate_out_bias)
    dtype, N = latents.dtype, latents.shape[0]
    exact = torch.promote_types(dtype, torch.float32)
    mixed = mix_bank_ref(gate.weights(), bank).to(dtype)
    tokens = torch.cat([latents, mixed]).to(exact)
    y = tokens @ embed_weight.to(exact).t() + embed_bias
    if lora_down is not None and lora_up is not None:
        rows = slice(0 if latent_lora else N, None)
        y[rows] += (tokens[rows] @ lora_down.to(exact)).to(dtype).to(exact) @ lora_up.to(exact)
    out.copy_(y)


def gate_mix_embed_cost(
    latents: Tensor,
    gate_input: Tensor,
    time: Tensor,
    noise_weight: Tensor,
    gate_in_weight: Tensor,
    gate_in_bias: Tensor,
    gate_out_weight: Tensor,
    gate_out_bias: Tensor,
    bank: Tensor,
    embed_weight: Tensor,
    embed_bias: Tensor,
    lora_down: Tensor | None,
    lora_up: Tensor | None,
    latent_lora: bool,
    out: Tensor,
) -> Cost:
    """What `gate_mix_embed` takes at least."""
    gate = Gate(latents, gate_input, time, noise_weight, gate_in_weight, gate_in_bias, gate_out_weight, gate_out_bias)
    N, B, C, _, _ = gate.sizes
    D = embed_weight.shape[0]
    branch = 0 if lora_down is None else 2 * (1 + latent_lora) * N * B * lora_down.shape[1] * (C + D)
    return Cost(
        read=gate.read() + nbytes(bank, embed_weight, embed_bias, lora_down, lora_up),
        written=nbytes(out),
        flops=gate.flops() + 2 * bank.numel() + 4 * N * B * C * D + branch,
    )
