"""The device code over rows of the residual stream, which `mogle_rt.kernels.stream_rows` launches.

The number of a row is r = position * B + image. Most programs hold a whole row in registers. Rows with a low-rank branch
are taken sixteen at a time, so that the two thin matrices of the branch are read once for all sixteen and multiplied on
tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

EPS = tl.constexpr(1e-6)


@triton.jit
def _group(r, batch, end0, end1):
    """The group and the image that each row belongs to."""
    position = r // batch
    return (position >= end0).to(tl.int64) + (position >= end1).to(tl.int64), (r % batch).to(tl.int64)


@triton.jit
def _modulation(table, group, image, stride_g, stride_b, cols, mask):
    """The fp32 values of a [G, B, D] table for these rows and channels."""
    at = (group * stride_g + image * stride_b)[:, None] + cols[None, :]
    return tl.load(table + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _updated(x, y, gate, x_ptr, at, mask, CLIP: tl.constexpr):
    """Round x + gate * y, write it to x, and return what was written in fp32."""
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
    """Compute those of the rows r that are below ``rows``, some with a low-rank branch, in steps of CHANNELS channels."""
    dtype = x_ptr.dtype.element_ty
    live = r < rows
    group, image = _group(r, batch, end0, end1)
    r64 = r.to(tl.int64)
    q = tl.arange(0, Q_BLOCK)
    if Q > 0:
        low_mask = (live & (r >= up_from))[:, None] & (q < Q)[None, :]
        low_y = tl.load(y_ptr + (r64 * y_stride)[:, None] + D + q[None, :], mask=low_mask, other=0.0)
    # Means and variances of chunks are merged one by one (Chan, Golub & LeVeque 1979), which is accurate for any mean.
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
            tl.debug_barrier()  # x is read again, possibly by other threads than those that wrote it
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
    """Compute those of the rows r that are below ``rows``. They have no low-rank branch and are held in registers."""
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
    end1,  # first position of the third group
    low_from,  # first row that any low-rank branch acts on
    down_from,  # first row that `down` acts on
    up_from,  # first row that `up` acts on
    low_programs,  # how many programs compute rows low_from to the end
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
    """The gated residual (if RESIDUAL) and the modulated norm (if NORM) of the rows of one program."""
    pid = tl.program_id(0)
    # Rows with a branch come first, because their programs take longest.
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
