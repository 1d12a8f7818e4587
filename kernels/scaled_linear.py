"""A linear layer with rows in eight bits on both sides; scales, bias, low-rank columns and GELU in its epilogue."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mogle_rt.kernels.common import KernelCost, check, interpreted, launch, nbytes, power_of_two, require
from mogle_rt.kernels.epilogue import (
    Tiles,
    check_epilogue,
    epilogue_arguments,
    epilogue_constants,
    finish,
    finish_ref,
    grid,
    tile_of,
)
from mogle_rt.kernels.inputs import Epilogue


def tiles(rows: int, columns: int, inner: int) -> Tiles:
    """128 x 128 numbers of 64 columns in 8 bits: 16 KiB a loop step. The interpreter is fastest with few programs."""
    if interpreted():
        return Tiles(
            min(power_of_two(rows, 16), 128),
            min(power_of_two(columns, 16), 128),
            min(power_of_two(inner, 32), 512),
            4,
            1,
        )
    tall = 128 if rows > 64 else power_of_two(rows, 16)
    return Tiles(tall, 128, 128 if inner >= 128 else 64, 8 if tall == 128 else 4, 3)


@triton.jit
def _scaled_linear_kernel(
    x_ptr,  # int8 or float8 [rows, K]
    x_scales_ptr,  # fp32 [rows]
    weight_ptr,  # int8 or float8 [columns, K]
    weight_scales_ptr,  # fp32 [columns]
    x_stride,
    weight_stride,
    bias_ptr,  # [columns]; this and what follows is described in Epilogue
    low_ptr,
    up_ptr,
    out_ptr,
    rows,
    columns,
    low_stride,
    up_stride,
    out_stride,
    K: tl.constexpr,
    R: tl.constexpr,
    R_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    TALL: tl.constexpr,
    INTEGER: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m, n = tile_of(rows, columns, ROWS, COLUMNS, TALL)
    live, wide, k = m < rows, n < columns, tl.arange(0, INNER)
    x_at = x_ptr + (m.to(tl.int64) * x_stride)[:, None] + k[None, :]
    weight_at = weight_ptr + (n.to(tl.int64) * weight_stride)[:, None] + k[None, :]
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.int32 if INTEGER else tl.float32)
    for start in range(0, K, INNER):
        inside = k < K - start
        x = tl.load(x_at + start, mask=live[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weight_at + start, mask=wide[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc=acc, out_dtype=tl.int32 if INTEGER else tl.float32)
    x_scale = tl.load(x_scales_ptr + m, mask=live, other=0.0)
    weight_scale = tl.load(weight_scales_ptr + n, mask=wide, other=0.0)
    y = acc.to(tl.float32) * x_scale[:, None] * weight_scale[None, :]
    finish(
        y, m, n, rows, columns, bias_ptr, low_ptr, up_ptr, out_ptr, low_stride, up_stride, out_stride,
        R, R_BLOCK, False, GELU, PRECISION,
    )  # fmt: skip


def scaled_linear(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    epilogue: Epilogue,
) -> None:
    """out = (x weightᵀ) x_scales weight_scalesᵀ, with the epilogue: + low upᵀ + bias, through GELU if asked for.

    Products of int8 are summed in int32, exactly and in any order; those of float8 in fp32. All else is in fp32, rounded
    once at the end.

    Args:
        x: int8 or float8_e4m3fn [rows, K]; x_scales: fp32 [rows]; see `mogle_rt.kernels.quantize_rows`.
        weight: of x's dtype [columns, K]; weight_scales: fp32 [columns].
        epilogue: what is added to the [rows, columns] products, and where the result is written.

    Raises:
        ValueError: a shape, dtype, stride or device doesn't fit.
    """
    check_epilogue(epilogue, x, weight.shape[0])
    (rows, K), columns = x.shape, weight.shape[0]
    require(x.dtype in (torch.int8, torch.float8_e4m3fn), f"x must be int8 or float8_e4m3fn, got {x.dtype}")
    require(x.dtype != torch.int8 or K * 127 * 127 < 2**31, f"sums of {K} products don't fit into 32 bits")
    check("x", x, (rows, K), x)
    check("x_scales", x_scales, (rows,), x, torch.float32)
    check("weight", weight, (columns, K), x)
    check("weight_scales", weight_scales, (columns,), x, torch.float32)
    if rows == 0 or columns == 0:
        return
    t = tiles(rows, columns, K)
    launch(
        _scaled_linear_kernel,
        grid(epilogue, t),
        x,
        x_scales,
        weight,
        weight_scales,
        x.stride(0),
        weight.stride(0),
        *epilogue_arguments(epilogue),
        K=K,
        INTEGER=x.dtype == torch.int8,
        **epilogue_constants(epilogue, t),
    )


def scaled_linear_ref(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    epilogue: Epilogue,
) -> None:
    """`scaled_linear` by PyTorch in fp64, rounded once at the end."""
    y = x.double() @ weight.double().t()
    y = y * x_scales.double()[:, None] * weight_scales.double()
    finish_ref(y, epilogue)


def scaled_linear_cost(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    epilogue: Epilogue,
) -> KernelCost:
    """The least that `scaled_linear` takes: each number is moved once."""
    (rows, K), columns = x.shape, weight.shape[0]
    read = nbytes(x, x_scales, weight, weight_scales, epilogue.bias, epilogue.low, epilogue.up)
    flops = 2 * rows * columns * (K + epilogue.rank)
    return KernelCost(read=read, written=nbytes(epilogue.out), flops=flops)
