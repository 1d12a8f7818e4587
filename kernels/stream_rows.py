"""One kernel over the rows of the residual stream: gated residual, norm, modulation and both low-rank branches.

`norm_modulate`, `residual_norm_modulate` and `residual` launch this kernel. The kernel itself is in
`mogle_rt.kernels.stream_rows_kernel`; this module has its tiles, its launcher, the same in PyTorch, and its cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from mogle_rt.kernels.common import (
    LARGEST_ROW,
    KernelCost,
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
from mogle_rt.kernels.stream_rows_kernel import EPS, stream_rows_kernel


@dataclass(frozen=True)
class Tiles:
    """Sizes of a program.

    Attributes:
        rows: how many rows a program takes without a low-rank branch.
        low_rows, channels: with a branch, how many rows it takes, and how many channels one of its loop steps.
        warps: of each program.
    """

    rows: int
    low_rows: int
    channels: int
    warps: int


def tiles(width: int, rows: int, dtype: torch.dtype) -> Tiles:
    """A row of 3072 channels is 24 values per thread. The interpreter is fastest with few large programs."""
    if interpreted():
        tall = min(power_of_two(rows), 256)
        return Tiles(tall, tall, power_of_two(width), 4)
    # Sixteen rows are the height of a tensor-core tile. Wider loop steps, or a third step that overlaps, would take
    # registers and shared memory from the whole-row programs, and a multiprocessor needs four of those to stay busy.
    channels = min(power_of_two(width, 16), 64 if dtype == torch.float32 else 128)
    return Tiles(1, 16, channels, 8 if width > 2048 else 4)


@dataclass(frozen=True)
class Residual:
    """x += gate * (y[..., :D] + y[..., D:] @ lora_up); the last term is added for positions >= lora_up_from only."""

    y: Tensor  # [L, B, D + Q]
    gate: Tensor  # [G, B, D]
    lora_up: Tensor | None  # [Q, D]
    lora_up_from: int
    clip: bool


@dataclass(frozen=True)
class Norm:
    """out = [normed, normed @ lora_down] with normed = LayerNorm(x) * scale + shift.

    For positions < lora_from the last columns are 0.
    """

    scale: Tensor  # [G, B, D]
    shift: Tensor
    out: Tensor  # [L, B, D + R]
    lora_down: Tensor | None  # [D, R]
    lora_from: int


def stream(x: Tensor, bounds: Sequence[int], residual: Residual | None, norm: Norm | None) -> None:
    """Check the arguments and launch the kernel once.

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
    y = gate = up = scale = shift = out = down = x  # placeholders, which the kernel doesn't access
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
        stream_rows_kernel,
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
    """`stream` by PyTorch in fp32 (fp64 for fp64), with each result rounded once."""
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


def cost(x: Tensor, bounds: Sequence[int], residual: Residual | None, norm: Norm | None) -> KernelCost:
    """The least that `stream` takes.

    Every row is moved once, of the tables those groups that have rows, and of the branches their matrices and their
    columns of the rows that they act on.
    """
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
    return KernelCost(read=read, written=written, flops=flops)
