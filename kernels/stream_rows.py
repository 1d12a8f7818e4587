"""Rows of the residual stream: gated residual, norm, modulation and both low-rank branches in one kernel.

`norm_modulate`, `residual_norm_modulate` and `residual` are launches of it.

A row is r = position * B + image. Most programs hold a whole row in registers. Rows with a low-rank branch are taken
sixteen at a time, so that its two thin matrices are read once for all of them and multiplied on tensor cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mogle_rt.kernels.common import (
    LARGEST_ROW,
    Cost,
    check,
    check_bounds,
    check_device,
    check_rows,
    group_rows,
    interpreted,
    launch,
    nbytes,
    power_of_two,
    precision,
    require,
)

EPS = tl.constexpr(1e-6)


@dataclass(frozen=True)
class Tiles:
    """Rows of a program without and with a low-rank branch, channels of one loop step there, warps."""

    rows: int
    low_rows: int
    channels: int
    warps: int


def tiles(width: int, rows: int, dtype: torch.dtype) -> Tiles:
    """One row of 3072 channels is 24 values a thread. The interpreter wants few, large programs."""
    if interpreted():
        tall = min(power_of_two(rows), 256)
        return Tiles(tall, tall, power_of_two(width), 4)
    # Sixteen rows are the height of a tensor-core tile. Wider steps, or a third one under way, take the registers and
    # shared memory of whole-row programs, of which a multiprocessor needs four to be kept busy.
    channels = min(power_of_two(width, 16), 64 if dtype == torch.float32 else 128)
    return Tiles(1, 16, channels, 8 if width > 2048 else 4)


@triton.jit
def _group(r, batch, end0, end1):
    """Group and image of rows."""
    position = r // batch
    return (position >= end0).to(tl.int64) + (position >= end1).to(tl.int64), (r % batch).to(tl.int64)


@triton.jit
def _modulation(table, group, image, stride_g, stride_b, cols, mask):
    """Values of a [G, B, D] table for rows and channels, fp32."""
    at = (group * stride_g + image * stride_b)[:, None] + cols[None, :]
    return tl.load(table + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _updated(x, y, gate, x_ptr, at, mask, CLIP: tl.constexpr):
    """x + gate * y, rounded and written to x; what was written, in fp32."""
    x += gate * y
    if CLIP:
        x = tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    rounded = x.to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + at, rounded, mask=mask)
    return rounded.to(tl.float32)


@triton.jit
def _low_rank_rows(
    x_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    down_ptr,
    up_ptr,
    r,
    rows,
    batch,
    end0,
    end1,
    down_from,
    up_from,
    down_stride,
    up_stride,
    x_stride,
    y_stride,
    out_stride,
    gate_g,
    gate_b,
    scale_g,
    scale_b,
    shift_g,
    shift_b,
    D: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    R_BLOCK: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    CLIP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows r below ``rows``, some with a low-rank branch, in steps of CHANNELS."""
    dtype = x_ptr.dtype.element_ty
    live = r < rows
    group, image = _group(r, batch, end0, end1)
    r64 = r.to(tl.int64)
    q = tl.arange(0, Q_BLOCK)
    if Q > 0:
        low_mask = (live & (r >= up_from))[:, None] & (q < Q)[None, :]
        low_y = tl.load(y_ptr + (r64 * y_stride)[:, None] + D + q[None, :], mask=low_mask, other=0.0)
    # Mean and variance of chunks joined one by one (Chan, Golub & LeVeque 1979): exact for any mean.
    mean = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, CHANNELS):
        cols = start + tl.arange(0, CHANNELS)
        mask = live[:, None] & (cols < D)[None, :]
        at = (r64 * x_stride)[:, None] + cols[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if RESIDUAL:
            y = tl.load(y_ptr + (r64 * y_stride)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            if Q > 0:
                up_mask = (q < Q)[:, None] & (cols < D)[None, :]
                up = tl.load(up_ptr + (q * up_stride)[:, None] + cols[None, :], mask=up_mask, other=0.0)
                y = tl.dot(low_y, up, acc=y, input_precision=PRECISION)
            gate = _modulation(gate_ptr, group, image, gate_g, gate_b, cols, mask)
            x = _updated(x, y, gate, x_ptr, at, mask, CLIP)
        if NORM:
            count = tl.minimum(D - start, CHANNELS).to(tl.float32)
            chunk_mean = tl.sum(x, axis=1) / count
            centred = tl.where(mask, x - chunk_mean[:, None], 0.0)
            delta = chunk_mean - mean
            seen = start + count
            mean += delta * (count / seen)
            squares += tl.sum(centred * centred, axis=1) + delta * delta * (start * count / seen)
    if NORM:
        if RESIDUAL:
            tl.debug_barrier()  # x is read again, maybe by other threads than wrote it
        scale_by = tl.rsqrt(squares / D + EPS)
        k = tl.arange(0, R_BLOCK)
        low = tl.zeros([ROWS, R_BLOCK], tl.float32)
        for start in range(0, D, CHANNELS):
            cols = start + tl.arange(0, CHANNELS)
            mask = live[:, None] & (cols < D)[None, :]
            x = tl.load(x_ptr + (r64 * x_stride)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            scale = _modulation(scale_ptr, group, image, scale_g, scale_b, cols, mask)
            shift = _modulation(shift_ptr, group, image, shift_g, shift_b, cols, mask)
            normed = ((x - mean[:, None]) * scale_by[:, None] * scale + shift).to(dtype)
            tl.store(out_ptr + (r64 * out_stride)[:, None] + cols[None, :], normed, mask=mask)
            if R > 0:
                down_mask = (cols < D)[:, None] & (k < R)[None, :]
                down = tl.load(down_ptr + (cols * down_stride)[:, None] + k[None, :], mask=down_mask, other=0.0)
                low = tl.dot(normed, down, acc=low, input_precision=PRECISION)
        if R > 0:
            low = tl.where((r >= down_from)[:, None], low, 0.0)
            low_at = (r64 * out_stride)[:, None] + D + k[None, :]
            tl.store(out_ptr + low_at, low.to(dtype), mask=live[:, None] & (k < R)[None, :])


@triton.jit
def _whole_rows(
    x_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    r,
    rows,
    batch,
    end0,
    end1,
    x_stride,
    y_stride,
    out_stride,
    gate_g,
    gate_b,
    scale_g,
    scale_b,
    shift_g,
    shift_b,
    D: tl.constexpr,
    R: tl.constexpr,
    R_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    CLIP: tl.constexpr,
):
    """Rows r below ``rows`` without a low-rank branch, held in registers."""
    dtype = x_ptr.dtype.element_ty
    live = r < rows
    group, image = _group(r, batch, end0, end1)
    r64 = r.to(tl.int64)
    cols = tl.arange(0, D_BLOCK)
    mask = live[:, None] & (cols < D)[None, :]
    at = (r64 * x_stride)[:, None] + cols[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        y = tl.load(y_ptr + (r64 * y_stride)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = _modulation(gate_ptr, group, image, gate_g, gate_b, cols, mask)
        x = _updated(x, y, gate, x_ptr, at, mask, CLIP)
    if NORM:
        mean = tl.sum(x, axis=1) / D
        centred = tl.where(mask, x - mean[:, None], 0.0)
        scale_by = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + EPS)
        scale = _modulation(scale_ptr, group, image, scale_g, scale_b, cols, mask)
        shift = _modulation(shift_ptr, group, image, shift_g, shift_b, cols, mask)
        normed = (centred * scale_by[:, None] * scale + shift).to(dtype)
        tl.store(out_ptr + (r64 * out_stride)[:, None] + cols[None, :], normed, mask=mask)
        if R > 0:
            k = tl.arange(0, R_BLOCK)
            low_at = (r64 * out_stride)[:, None] + D + k[None, :]
            none = tl.zeros([ROWS, R_BLOCK], tl.float32).to(dtype)
            tl.store(out_ptr + low_at, none, mask=live[:, None] & (k < R)[None, :])


@triton.jit
def _stream_rows_kernel(
    x_ptr,  # [rows, D]
    y_ptr,  # [rows, D + Q], with RESIDUAL
    gate_ptr,  # [G, B, D], with RESIDUAL
    scale_ptr,  # [G, B, D], with NORM
    shift_ptr,
    out_ptr,  # [rows, D + R], with NORM
    down_ptr,  # [D, R]
    up_ptr,  # [Q, D]
    rows,
    batch,
    end0,  # first position of the second group
    end1,  # and of the third
    low_from,  # first row that any low-rank branch acts on
    down_from,  # first row of `down`
    up_from,  # first row of `up`
    low_programs,  # programs of rows low_from to the end
    x_stride,
    y_stride,
    out_stride,
    down_stride,
    up_stride,
    gate_g,
    gate_b,
    scale_g,
    scale_b,
    shift_g,
    shift_b,
    D: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    R_BLOCK: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LOW_ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    CLIP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gated residual (RESIDUAL) and modulated norm (NORM) of the rows of one program."""
    pid = tl.program_id(0)
    # Rows with a branch first: their programs are the longest.
    if pid < low_programs:
        _low_rank_rows(
            x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, out_ptr, down_ptr, up_ptr,
            low_from + pid * LOW_ROWS + tl.arange(0, LOW_ROWS), rows, batch, end0, end1, down_from, up_from,
            down_stride, up_stride, x_stride, y_stride, out_stride,
            gate_g, gate_b, scale_g, scale_b, shift_g, shift_b,
            D, R, Q, R_BLOCK, Q_BLOCK, LOW_ROWS, CHANNELS, RESIDUAL, NORM, CLIP, PRECISION,
        )  # fmt: skip
    else:
        _whole_rows(
            x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, out_ptr,
            (pid - low_programs) * ROWS + tl.arange(0, ROWS), low_from, batch, end0, end1,
            x_stride, y_stride, out_stride, gate_g, gate_b, scale_g, scale_b, shift_g, shift_b,
            D, R, R_BLOCK, D_BLOCK, ROWS, RESIDUAL, NORM, CLIP,
        )  # fmt: skip


@dataclass(frozen=True)
class Residual:
    """x += gate * (y[..., :D] + y[..., D:] @ lora_up), the last term for positions >= lora_up_from."""

    y: Tensor  # [L, B, D + Q]
    gate: Tensor  # [G, B, D]
    lora_up: Tensor | None  # [Q, D]
    lora_up_from: int
    clip: bool


@dataclass(frozen=True)
class Norm:
    """out = [LayerNorm(x) * scale + shift, that @ lora_down], the last columns 0 for positions < lora_from."""

    scale: Tensor  # [G, B, D]
    shift: Tensor
    out: Tensor  # [L, B, D + R]
    lora_down: Tensor | None  # [D, R]
    lora_from: int


def stream(x: Tensor, bounds: Sequence[int], residual: Residual | None, norm: Norm | None) -> None:
    """Check the arguments and launch the kernel, once.

    Raises:
        ValueError: a shape, dtype, stride or device doesn't fit.
    """
    check_device(x)
    require(x.dim() == 3, f"x must be [L, B, D], got {list(x.shape)}")
    L, B, D = x.shape
    require(0 < D <= LARGEST_ROW, f"rows must have 1 to {LARGEST_ROW} channels, got {D}")
    check("x", x, (L, B, D), x)
    end0, end1 = check_bounds(bounds, L)
    G, rows = len(bounds), L * B
    Q = R = 0
    down_from = up_from = rows
    y = gate = up = scale = shift = out = down = x  # stand-ins: pointers that the kernel doesn't follow
    if residual is not None:
        y, gate = residual.y, residual.gate
        if residual.lora_up is not None:
            up, Q, up_from = residual.lora_up, residual.lora_up.shape[0], _row(residual.lora_up_from, L, B)
            check("lora_up", up, (Q, D), x)
        check("y", y, (L, B, D + Q), x)
        check("gate", gate, (G, B, D), x)
    if norm is not None:
        scale, shift, out = norm.scale, norm.shift, norm.out
        if norm.lora_down is not None:
            down, R, down_from = norm.lora_down, norm.lora_down.shape[1], _row(norm.lora_from, L, B)
            check("lora_down", down, (D, R), x)
        check("out", out, (L, B, D + R), x)
        check("scale", scale, (G, B, D), x)
        check("shift", shift, (G, B, D), x)
    if rows == 0:
        return
    low_from = min(down_from, up_from)
    t = tiles(D, rows, x.dtype)
    low_programs = triton.cdiv(rows - low_from, t.low_rows)
    launch(
        _stream_rows_kernel,
        (low_programs + triton.cdiv(low_from, t.rows),),
        x,
        y,
        gate,
        scale,
        shift,
        out,
        down,
        up,
        rows,
        B,
        end0,
        end1,
        low_from,
        down_from,
        up_from,
        low_programs,
        check_rows("x", x),
        check_rows("y", y),
        check_rows("out", out),
        down.stride(0),
        up.stride(0),
        *gate.stride()[:2],
        *scale.stride()[:2],
        *shift.stride()[:2],
        D=D,
        R=R,
        Q=Q,
        R_BLOCK=power_of_two(R, 16),
        Q_BLOCK=power_of_two(Q, 16),
        D_BLOCK=power_of_two(D),
        ROWS=t.rows,
        LOW_ROWS=t.low_rows,
        CHANNELS=t.channels,
        RESIDUAL=residual is not None,
        NORM=norm is not None,
        CLIP=residual is not None and residual.clip,
        PRECISION=precision(x.dtype),
        num_warps=t.warps,
        num_stages=2 if residual is None else 3,
    )


def _row(position: int, length: int, batch: int) -> int:
    require(0 <= position <= length, f"a branch must start at position 0 to {length}, got {position}")
    return position * batch


def reference(x: Tensor, bounds: Sequence[int], residual: Residual | None, norm: Norm | None) -> None:
    """The same in PyTorch, in fp32 (fp64 for fp64), each result rounded once."""
    exact = torch.promote_types(x.dtype, torch.float32)
    D = x.shape[-1]
    if residual is not None:
        y = residual.y[..., :D].to(exact)
        if residual.lora_up is not None:
            y = y.clone()
            tail = slice(residual.lora_up_from, None)
            y[tail] += residual.y[tail, :, D:].to(exact) @ residual.lora_up.to(exact)
        for rows, gate in zip(group_rows(bounds), residual.gate.to(exact), strict=True):
            new = x[rows].to(exact) + gate * y[rows]
            x[rows] = (new.clamp(-65504, 65504) if residual.clip else new).to(x.dtype)
    if norm is not None:
        normed = F.layer_norm(x.to(exact), (D,), eps=EPS.value)
        for rows, scale, shift in zip(group_rows(bounds), norm.scale.to(exact), norm.shift.to(exact), strict=True):
            norm.out[rows, :, :D] = (normed[rows] * scale + shift).to(x.dtype)
        norm.out[..., D:] = 0
        if norm.lora_down is not None:
            tail = slice(norm.lora_from, None)
            norm.out[tail, :, D:] = (norm.out[tail, :, :D].to(exact) @ norm.lora_down.to(exact)).to(x.dtype)


def cost(x: Tensor, bounds: Sequence[int], residual: Residual | None, norm: Norm | None) -> Cost:
    """Every row once; of the tables, groups that have rows; of the branches, the matrices and the rows' columns."""
    L, B, D = x.shape
    size = x.element_size()
    table = sum(rows.start < rows.stop for rows in group_rows(bounds)) * B * D * size
    read, written, flops = nbytes(x), 0, 0
    if residual is not None:
        read += L * B * D * size + table
        written += nbytes(x)
        low_rows = (L - residual.lora_up_from) * B
        if residual.lora_up is not None and low_rows:
            Q = residual.lora_up.shape[0]
            read += low_rows * Q * size + nbytes(residual.lora_up)
            flops += 2 * low_rows * Q * D
    if norm is not None:
        read += 2 * table
        written += nbytes(norm.out)
        low_rows = (L - norm.lora_from) * B
        if norm.lora_down is not None and low_rows:
            read += nbytes(norm.lora_down)
            flops += 2 * low_rows * D * norm.lora_down.shape[1]
    return Cost(read=read, written=written, flops=flops)
