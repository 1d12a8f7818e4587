"""Rows of activations in eight bits: rotated in groups of columns, scaled by their largest value, rounded."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mogle_rt.kernels.common import LARGEST_ROW, KernelCost, check, check_device, launch, power_of_two, require

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
ROTATIONS = (1, 4, 16, 64, 256)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: a float32 number below 2^22 that is added to it is rounded to an integer


@triton.jit
def _quantize_rows_kernel(
    x_ptr,  # [rows, FIRST]
    more_ptr,  # [rows, K - FIRST]
    out_ptr,  # int8 or float8 [rows, K]
    scales_ptr,  # fp32 [rows]
    x_stride,
    more_stride,
    out_stride,
    K: tl.constexpr,
    FIRST: tl.constexpr,
    K_BLOCK: tl.constexpr,
    ROTATION: tl.constexpr,
    STAGES: tl.constexpr,  # ROTATION = 4 ** STAGES
    LARGEST: tl.constexpr,
    INTEGER: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, K_BLOCK)
    mask = columns < K
    x = tl.load(x_ptr + row * x_stride + columns, mask=columns < FIRST, other=0.0).to(tl.float32)
    if FIRST < K:
        more_at = more_ptr + row * more_stride + columns - FIRST
        x += tl.load(more_at, mask=mask & (columns >= FIRST), other=0.0).to(tl.float32)
    # One digit of a column's number (to base 4) after the other. The matrix J / 2 - 1 of a digit is H4 with its columns
    # in reverse order, so the columns of each group come out in reverse order; they are turned around once.
    for stage in tl.static_range(STAGES):
        x = tl.reshape(x, [K_BLOCK // 4 ** (stage + 1), 4, 4**stage])
        x = 0.5 * tl.sum(x, axis=1, keep_dims=True) - x
    if STAGES > 0:
        x = tl.flip(tl.reshape(x, [K_BLOCK // ROTATION, ROTATION]), 1)
        x = tl.reshape(x, [K_BLOCK])
    largest = tl.max(tl.abs(x), axis=0)
    scale = largest / LARGEST + tl.sum(x * 0.0, axis=0)  # NaN, which a maximum may leave out, must not be lost
    inverse = tl.where(largest > 0, LARGEST / largest, 0.0)
    tl.store(scales_ptr + row, scale)
    y = x * inverse
    if INTEGER:
        y = (y + ROUND) - ROUND
    y = tl.clamp(y, -LARGEST, LARGEST)
    tl.store(out_ptr + row * out_stride + columns, y.to(out_ptr.dtype.element_ty), mask=mask)


def quantize_rows(x: Tensor, more: Tensor | None, out: Tensor, scales: Tensor, rotation: int) -> None:
    """out = round([x, more] R / scale), scale = the row's largest |[x, more] R| over 127 (int8) or 448 (float8_e4m3).

    R is block-diagonal: the regular Hadamard matrix of ``rotation`` columns (ConvRot, arXiv 2512.03673), see
    `mogle_rt.linear.quantised.rotation`. A row of zeros has the scale 0. NaN and infinite values give a scale that is not
    finite, and so reach the product.

    Args:
        x: [rows, F], fp32, fp16 or bf16, channels with stride 1. more: [rows, K - F] of the same dtype, or None (F = K).
        out: int8 or float8_e4m3fn [rows, K], written. scales: fp32 [rows], written.
        rotation: 1 (none), 4, 16, 64 or 256; divides K.

    Raises:
        ValueError: a shape, dtype, stride or device doesn't fit.
    """
    check_device(x)
    require(x.dim() == 2, f"x must be [rows, F], got {list(x.shape)}")
    rows, first = x.shape
    K = first + (0 if more is None else more.shape[-1])
    require(0 < K <= LARGEST_ROW, f"rows must have 1 to {LARGEST_ROW} channels, got {K}")
    require(out.dtype in LARGEST, f"out must be int8 or float8_e4m3fn, got {out.dtype}")
    require(rotation in ROTATIONS and K % rotation == 0, f"rotation must be 1, 4, 16, 64 or 256 and divide {K}")
    check("x", x, (rows, first), x)
    if more is not None:
        check("more", more, (rows, K - first), x)
    check("out", out, (rows, K), x, out.dtype)
    check("scales", scales, (rows,), x, torch.float32)
    if rows == 0:
        return
    block = power_of_two(K, rotation)
    launch(
        _quantize_rows_kernel,
        (rows,),
        x,
        x if more is None else more,
        out,
        scales,
        x.stride(0),
        0 if more is None else more.stride(0),
        out.stride(0),
        K=K,
        FIRST=first,
        K_BLOCK=block,
        ROTATION=rotation,
        STAGES=ROTATIONS.index(rotation),
        LARGEST=LARGEST[out.dtype],
        INTEGER=out.dtype == torch.int8,
        num_warps=4 if block <= 4096 else 8,
    )


def rotation_matrix(size: int, like: Tensor) -> Tensor:
    """R of one group, [size, size]."""
    step = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64) / 2
    made = torch.ones(1, 1, dtype=torch.float64)
    while len(made) < size:
        made = torch.kron(made, step)
    return made.to(like.device, like.dtype)


def quantize_rows_ref(x: Tensor, more: Tensor | None, out: Tensor, scales: Tensor, rotation: int) -> None:
    """`quantize_rows` by PyTorch in fp32 (fp64 for fp64)."""
    exact = (x if more is None else torch.cat([x, more], dim=1)).to(torch.promote_types(x.dtype, torch.float32))
    if rotation > 1:
        exact = (exact.unflatten(1, (-1, rotation)) @ rotation_matrix(rotation, exact)).flatten(1)
    largest, top = exact.abs().amax(1), LARGEST[out.dtype]
    scales.copy_(largest / top)
    scaled = (exact * torch.where(largest > 0, top / largest, 0.0)[:, None]).clamp(-top, top)
    out.copy_(scaled.round() if out.dtype == torch.int8 else scaled)


def quantize_rows_cost(x: Tensor, more: Tensor | None, out: Tensor, scales: Tensor, rotation: int) -> KernelCost:
    """The least that `quantize_rows` takes: each number is read and written once."""
    rows, K = out.shape
    return KernelCost(read=rows * K * x.element_size(), written=rows * (K + 4), flops=0)
