"""The gate over the experts, a part of several kernels: checks of arguments, tiles, device code, the same in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mogle_rt.kernels.common import check, check_device, interpreted, nbytes, power_of_two, precision, require
from mogle_rt.kernels.inputs import Gate

LARGEST_WIDTH = 256  # the most channels of latents and of the gate's layers, because a program holds them whole

# The least width of a block in the gate's products. Triton distributes all products of a chain over the warps in the same
# way. If the first product were not wider than tall, it would put the warps one below the other, and with only 16 rows
# every warp would then compute all of them.
WIDER_THAN_TALL = 32


def check_gate(gate: Gate) -> None:
    """Raise ValueError if a shape, dtype, stride or device doesn't fit."""
    x = gate.latents
    check_device(x)
    require(x.dim() == 3, f"latents must be [N, B, C], got {list(x.shape)}")
    require(gate.in_weight.dim() == 2 and gate.out_weight.dim() == 2, "the gate's weights must be matrices")
    N, B, C, G, E = gate.sizes
    require(0 < max(C, G, E) <= LARGEST_WIDTH, f"C, G and E must be 1 to {LARGEST_WIDTH}, got {C}, {G}, {E}")
    check("latents", x, (N, B, C), x)
    check("gate_input", gate.gate_input, (N, B, C), x)
    check("time", gate.time, (C,), x)
    check("noise_weight", gate.noise_weight, (C, C), x)
    check("the gate's in_weight", gate.in_weight, (G, C), x)
    check("the gate's in_bias", gate.in_bias, (G,), x)
    check("the gate's out_weight", gate.out_weight, (E, G), x)
    check("the gate's out_bias", gate.out_bias, (E,), x)


def gate_arguments(gate: Gate) -> tuple[Any, ...]:
    """The first arguments of every kernel with a gate: tensors, strides and the number of tokens."""
    return (
        gate.latents,
        gate.gate_input,
        gate.time,
        gate.noise_weight,
        gate.in_weight,
        gate.in_bias,
        gate.out_weight,
        gate.out_bias,
        *gate.latents.stride()[:2],
        *gate.gate_input.stride()[:2],
        gate.noise_weight.stride(0),
        gate.in_weight.stride(0),
        gate.out_weight.stride(0),
        gate.latents.shape[0],
    )


def gate_constants(gate: Gate) -> dict[str, Any]:
    """The constants that every kernel with a gate is compiled for."""
    N, B, C, G, E = gate.sizes
    return {
        "C": C,
        "G": G,
        "E": E,
        "C_BLOCK": power_of_two(C, WIDER_THAN_TALL),
        "G_BLOCK": power_of_two(G, WIDER_THAN_TALL),
        "E_BLOCK": power_of_two(E, WIDER_THAN_TALL),
        "ROWS": tile_rows(N, B, gate.latents.dtype),
        "PRECISION": precision(gate.latents.dtype),
    }


def gate_weights_ref(gate: Gate) -> Tensor:
    """`gate_weights` [N, B, E] by PyTorch in fp32, or in fp64 for fp64. Results of layers are rounded to the dtype."""
    dtype = gate.latents.dtype
    exact = torch.promote_types(dtype, torch.float32)

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return x.to(exact) @ weight.to(exact).t()

    h = linear(gate.latents, gate.noise_weight) + gate.gate_input + gate.time
    hidden = (linear(h.to(dtype), gate.in_weight) + gate.in_bias).relu()
    return (linear(hidden.to(dtype), gate.out_weight) + gate.out_bias).softmax(-1)


def gate_read(gate: Gate) -> int:
    """Bytes of all inputs and weights, each read once."""
    parameters = (gate.noise_weight, gate.in_weight, gate.in_bias, gate.out_weight, gate.out_bias)
    return nbytes(gate.latents, gate.gate_input, gate.time, *parameters)


def gate_flops(gate: Gate) -> int:
    """Floating point operations of the three layers."""
    N, B, C, G, E = gate.sizes
    return 2 * N * B * (C * C + C * G + G * E)


def tile_rows(tokens: int, batch: int, dtype: torch.dtype) -> int:
    """How many tokens a program computes.

    A program takes only 16 tokens, the height of a tensor-core tile, until there are many programs for each
    multiprocessor. In fp32 it always takes 16, because the three products of each layer would spill with more.
    """
    if interpreted():
        return min(power_of_two(tokens, 16), 256)
    return 16 if tokens * batch <= 16384 or dtype == torch.float32 else 32


@triton.jit
def load_transposed(weight_ptr, stride, inner, outer, INNER: tl.constexpr, OUTER: tl.constexpr):
    """Load a weight that lies in memory as [out, in] as a block [in, out], with zeros outside of it."""
    mask = (inner < INNER)[:, None] & (outer < OUTER)[None, :]
    return tl.load(weight_ptr + (outer * stride)[None, :] + inner[:, None], mask=mask, other=0.0)


@triton.jit
def gate_weights(
    latents_ptr,
    input_ptr,
    time_ptr,
    noise_ptr,
    in_ptr,
    in_bias_ptr,
    out_ptr,
    out_bias_ptr,
    latents_n,
    latents_b,
    input_n,
    input_b,
    noise_stride,
    in_stride,
    out_stride,
    n,  # tokens of this program
    live,  # which of them are tokens
    image,
    C: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    C_BLOCK: tl.constexpr,
    G_BLOCK: tl.constexpr,
    E_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The softmax over the experts, fp32 [ROWS, E_BLOCK] with zeros from E on, and the latents [ROWS, C_BLOCK]."""
    dtype = latents_ptr.dtype.element_ty
    c, g, e = tl.arange(0, C_BLOCK), tl.arange(0, G_BLOCK), tl.arange(0, E_BLOCK)
    mask = live[:, None] & (c < C)[None, :]
    latents = tl.load(latents_ptr + (n * latents_n + image * latents_b)[:, None] + c[None, :], mask=mask, other=0.0)
    h = tl.load(input_ptr + (n * input_n + image * input_b)[:, None] + c[None, :], mask=mask, other=0.0)
    h = h.to(tl.float32) + tl.load(time_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    noise = load_transposed(noise_ptr, noise_stride, c, c, C, C)
    h = tl.dot(latents, noise, acc=h, input_precision=PRECISION)
    into = load_transposed(in_ptr, in_stride, c, g, C, G)
    hidden = tl.dot(h.to(dtype), into, input_precision=PRECISION)
    hidden += tl.load(in_bias_ptr + g, mask=g < G, other=0.0).to(tl.float32)[None, :]
    hidden = tl.maximum(hidden, 0.0, propagate_nan=tl.PropagateNan.ALL)
    out = load_transposed(out_ptr, out_stride, g, e, G, E)
    logits = tl.dot(hidden.to(dtype), out, input_precision=PRECISION)
    logits += tl.load(out_bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    logits = tl.where((e < E)[None, :], logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None], latents


@triton.jit
def column(weights, number, E_BLOCK: tl.constexpr):
    """One expert's weights: [ROWS, E_BLOCK] -> [ROWS, 1]."""
    chosen = (tl.arange(0, E_BLOCK) == number)[None, :]
    return tl.sum(tl.where(chosen, weights, 0.0), axis=1)[:, None]


@triton.jit
def mix_bank(
    weights,
    bank_ptr,
    bank_n,
    bank_b,
    bank_e,
    n,
    live,
    image,
    C: tl.constexpr,
    E: tl.constexpr,
    C_BLOCK: tl.constexpr,
    E_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The sum of the experts' outputs in the bank, each times its weight: fp32 [ROWS, C_BLOCK]."""
    c = tl.arange(0, C_BLOCK)
    mask = live[:, None] & (c < C)[None, :]
    at = bank_ptr + (n * bank_n + image * bank_b)[:, None] + c[None, :]
    mixed = tl.zeros([ROWS, C_BLOCK], tl.float32)
    # The loop is unrolled so that all loads have started before the first result is needed.
    for number in tl.static_range(E):
        outputs = tl.load(at + number * bank_e, mask=mask, other=0.0).to(tl.float32)
        mixed += column(weights, number, E_BLOCK) * outputs
    return mixed


def mix_bank_ref(weights: Tensor, bank: Tensor) -> Tensor:
    """`mix_bank` by PyTorch: [N, B, E] and [N, B, E, C] -> [N, B, C] in the weights' dtype."""
    return (weights[..., None] * bank.to(weights.dtype)).sum(2)
