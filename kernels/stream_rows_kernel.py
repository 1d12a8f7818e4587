"""Device code over rows of the residual stream, see `mogle_rt.kernels.stream_rows`.

A row is r = position * B + image. Most programs hold a whole row in registers. Rows with a low-rank branch are taken
sixteen at a time, so that its two thin matrices are read once for all of them and multiplied on tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

EPS = tl.constexpr(1e-6)


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
def stream_rows_kernel(
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
