"""The end of a linear layer's kernel, after the product: checks, arguments, device code, and the same in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mogle_rt.kernels.common import DTYPES, check, interpreted, power_of_two, precision, recording_now, require
from mogle_rt.kernels.inputs import Epilogue

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


def check_epilogue(epilogue: Epilogue, x: Tensor, columns: int) -> None:
    """Check that the epilogue fits the product of x [rows, K] with a weight of this many rows.

    Raises:
        ValueError: a shape, dtype, stride or device doesn't fit.
    """
    bias, low, up, out, R = epilogue.bias, epilogue.low, epilogue.up, epilogue.out, epilogue.rank
    require(x.dim() == 2, f"x must be [rows, K], got {list(x.shape)}")
    require(out.dtype in DTYPES, f"out must be one of {', '.join(map(str, DTYPES))}, got {out.dtype}")
    ready = x.is_cuda or recording_now() or (x.device.type == "cpu" and interpreted())
    require(ready, f"Triton kernels need a GPU, got a tensor on {x.device} (or set TRITON_INTERPRET=1)")
    check("out", out, (x.shape[0], columns), x, out.dtype)
    check("bias", bias, (columns,), out)
    require((low is None) == (up is None), "low and up are given together or not at all")
    if low is not None and up is not None:
        check("low", low, (x.shape[0], R), out)
        check("up", up, (columns, R), out)


def grid(epilogue: Epilogue, tile: Tiles) -> tuple[int]:
    """The number of programs."""
    rows, columns = epilogue.out.shape
    return (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)


def epilogue_arguments(epilogue: Epilogue) -> tuple[Any, ...]:
    """The last arguments of every kernel with an epilogue: tensors, sizes and strides."""
    bias, low, up, out = epilogue.bias, epilogue.low, epilogue.up, epilogue.out
    return (
        bias,
        bias if low is None else low,
        bias if up is None else up,
        out,
        *out.shape,
        0 if low is None else low.stride(0),
        0 if up is None else up.stride(0),
        out.stride(0),
    )


def epilogue_constants(epilogue: Epilogue, tile: Tiles) -> dict[str, Any]:
    """The constants that every kernel with an epilogue is compiled for, and its launch options."""
    return {
        "R": epilogue.rank,
        "R_BLOCK": power_of_two(epilogue.rank, 16),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "INNER": tile.inner,
        "TALL": DEEP,
        "GELU": epilogue.gelu,
        "PRECISION": precision(epilogue.out.dtype),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def finish_ref(y: Tensor, epilogue: Epilogue, add: bool = False) -> None:
    """`finish` by PyTorch, rounded once at the end. y: fp64 [rows, columns]."""
    y = y + (epilogue.out if add else epilogue.bias).double()
    if epilogue.low is not None and epilogue.up is not None:
        y = y + epilogue.low.double() @ epilogue.up.double().t()
    epilogue.out.copy_(F.gelu(y, approximate="tanh") if epilogue.gelu else y)


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
def finish(
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
