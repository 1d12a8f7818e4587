"""A linear layer with rows in eight bits on both sides; scales, bias, low-rank columns and GELU in its epilogue."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mogle_rt.kernels.common import (
    DTYPES,
    KernelCost,
    check,
    interpreted,
    launch,
    nbytes,
    power_of_two,
    precision,
    recording_now,
    require,
)

GELU_A = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
GELU_B = tl.constexpr(0.0713548162726)  # 0.044715 times that
DEEP = 4  # tiles of rows that are walked together, so that tiles of the weight stay in the L2 cache


@dataclass(frozen=True)
class Tiles:
    """Rows, columns and inner columns of a program's tile, its warps, and how many loop steps overlap."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


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
def tile_of(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TALL: tl.constexpr):
    """The rows and columns of this program's tile: TALL tiles of rows after one another share a tile of columns."""
    program = tl.program_id(0)
    tiles_down = tl.cdiv(rows, ROWS)
    group = program // (TALL * tl.cdiv(columns, COLUMNS))
    first = group * TALL
    height = tl.minimum(tiles_down - first, TALL)
    inside = program % (TALL * tl.cdiv(columns, COLUMNS))
    m = (first + inside % height) * ROWS + tl.arange(0, ROWS)
    n = (inside // height) * COLUMNS + tl.arange(0, COLUMNS)
    return m, n


@triton.jit
def epilogue(
    y, m, n, rows, columns, bias_ptr, low_ptr, up_ptr, out_ptr, low_stride, up_stride, out_stride,
    R: tl.constexpr, R_BLOCK: tl.constexpr, ADD: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add low-rank columns and the bias (or, with ADD, what is there), apply GELU, round and write."""
    live, wide = m < rows, n < columns
    m64, n64 = m.to(tl.int64), n.to(tl.int64)
    if R > 0:
        r = tl.arange(0, R_BLOCK)
        low = tl.load(
            low_ptr + (m64 * low_stride)[:, None] + r[None, :], mask=live[:, None] & (r < R)[None, :], other=0.0
        )
        up = tl.load(up_ptr + (n64 * up_stride)[:, None] + r[None, :], mask=wide[:, None] & (r < R)[None, :], other=0.0)
        y = tl.dot(low, tl.trans(up), acc=y, input_precision=PRECISION)
    at = (m64 * out_stride)[:, None] + n[None, :]
    if ADD:
        y += tl.load(out_ptr + at, mask=live[:, None] & wide[None, :], other=0.0).to(tl.float32)
    else:
        y += tl.load(bias_ptr + n, mask=wide, other=0.0).to(tl.float32)[None, :]
    if GELU:
        y = y * tl.sigmoid(y * (GELU_A + GELU_B * y * y))
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=live[:, None] & wide[None, :])


@triton.jit
def _scaled_linear_kernel(
    x_ptr,  # int8 or float8 [rows, K]
    x_scales_ptr,  # fp32 [rows]
    weight_ptr,  # int8 or float8 [columns, K]
    weight_scales_ptr,  # fp32 [columns]
    bias_ptr,  # [columns]
    low_ptr,  # [rows, R]
    up_ptr,  # [columns, R]
    out_ptr,  # [rows, columns]
    rows,
    columns,
    x_stride,
    weight_stride,
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
    epilogue(
        y, m, n, rows, columns, bias_ptr, low_ptr, up_ptr, out_ptr, low_stride, up_stride, out_stride,
        R, R_BLOCK, False, GELU, PRECISION,
    )  # fmt: skip


def scaled_linear(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    out: Tensor,
    gelu: bool,
) -> None:
    """out = (x weightᵀ) x_scales weight_scalesᵀ + low upᵀ + bias, through GELU (tanh form) if asked for.

    Products of int8 are summed in int32, exactly and in any order; those of float8 in fp32. All else is in fp32, rounded
    once at the end.

    Args:
        x: int8 or float8_e4m3fn [rows, K]; x_scales: fp32 [rows]; see `mogle_rt.kernels.quantize_rows`.
        weight: of x's dtype [columns, K]; weight_scales: fp32 [columns].
        bias: [columns]. low: [rows, R] and up: [columns, R], or None (R = 0). All of out's dtype.
        out: [rows, columns], fp32, fp16 or bf16, written.

    Raises:
        ValueError: a shape, dtype, stride or device doesn't fit.
    """
    (rows, K), columns, R = x.shape, weight.shape[0], check_epilogue(x, weight.shape[0], bias, low, up, out)
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
        (triton.cdiv(rows, t.rows) * triton.cdiv(columns, t.columns),),
        x,
        x_scales,
        weight,
        weight_scales,
        bias,
        bias if low is None else low,
        bias if up is None else up,
        out,
        rows,
        columns,
        x.stride(0),
        weight.stride(0),
        0 if low is None else low.stride(0),
        0 if up is None else up.stride(0),
        out.stride(0),
        K=K,
        R=R,
        R_BLOCK=power_of_two(R, 16),
        ROWS=t.rows,
        COLUMNS=t.columns,
        INNER=t.inner,
        TALL=DEEP,
        INTEGER=x.dtype == torch.int8,
        GELU=gelu,
        PRECISION=precision(out.dtype),
        num_warps=t.warps,
        num_stages=t.stages,
    )


def check_epilogue(x: Tensor, columns: int, bias: Tensor, low: Tensor | None, up: Tensor | None, out: Tensor) -> int:
    """Check what the epilogue reads and writes, and return R.

    Raises:
        ValueError: a shape, dtype, stride or device doesn't fit.
    """
    require(x.dim() == 2, f"x must be [rows, K], got {list(x.shape)}")
    require(out.dtype in DTYPES, f"out must be one of {', '.join(map(str, DTYPES))}, got {out.dtype}")
    ready = x.is_cuda or recording_now() or (x.device.type == "cpu" and interpreted())
    require(ready, f"Triton kernels need a GPU, got a tensor on {x.device} (or set TRITON_INTERPRET=1)")
    check("out", out, (x.shape[0], columns), x, out.dtype)
    check("bias", bias, (columns,), out)
    require((low is None) == (up is None), "low and up are given together or not at all")
    if low is None or up is None:
        return 0
    R = low.shape[-1]
    check("low", low, (x.shape[0], R), out)
    check("up", up, (columns, R), out)
    return R


def scaled_linear_ref(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    out: Tensor,
    gelu: bool,
) -> None:
    """`scaled_linear` by PyTorch in fp64, rounded once at the end."""
    y = x.double() @ weight.double().t()
    y = y * x_scales.double()[:, None] * weight_scales.double()
    finish_ref(y + bias.double(), low, up, out, gelu)


def finish_ref(y: Tensor, low: Tensor | None, up: Tensor | None, out: Tensor, gelu: bool) -> None:
    """The epilogue's low-rank columns, GELU and rounding by PyTorch. y: fp64 [rows, columns]."""
    if low is not None and up is not None:
        y = y + low.double() @ up.double().t()
    out.copy_(F.gelu(y, approximate="tanh") if gelu else y)


def scaled_linear_cost(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    out: Tensor,
    gelu: bool,
) -> KernelCost:
    """The least that `scaled_linear` takes: each number is moved once."""
    (rows, K), columns = x.shape, weight.shape[0]
    R = 0 if low is None else low.shape[1]
    read = nbytes(x, x_scales, weight, weight_scales, bias, low, up)
    return KernelCost(read=read, written=nbytes(out), flops=2 * rows * columns * (K + R))
