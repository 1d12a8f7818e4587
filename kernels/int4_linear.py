"""A linear layer whose weight has four bits a number: unpacked in registers, with its low-rank part in the same launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mogle_rt.kernels.common import KernelCost, check, check_device, interpreted, launch, nbytes, power_of_two, require
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


def tiles(rows: int, columns: int, heights: Sequence[int]) -> Tiles:
    """A tile's columns belong to one of the stacked layers, whose low-rank part they share."""
    wide = 128
    while wide > 16 and any(height % wide for height in heights[:-1]):
        wide //= 2
    if interpreted():
        return Tiles(min(power_of_two(rows, 16), 128), min(wide, power_of_two(columns, 16)), 64, 4, 1)
    # With 128 columns, sm_89 and sm_120 run out of registers while they unpack.
    return Tiles(64 if rows > 32 else 32, min(wide, 64), 64, 4, 3)


@triton.jit
def _int4_linear_kernel(
    x_ptr,  # [rows, K]
    packed_ptr,  # uint8 [columns, K / 2]
    scales_ptr,  # bf16 [columns, K / GROUP]
    down_ptr,  # bf16 [layers * RANK, K]
    rank_up_ptr,  # bf16 [columns, RANK]
    end0,  # of the columns of the first three stacked layers
    end1,
    end2,
    x_stride,
    packed_stride,
    scales_stride,
    down_stride,
    rank_up_stride,
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
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    R: tl.constexpr,
    R_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    TALL: tl.constexpr,
    ADD: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m, n = tile_of(rows, columns, ROWS, COLUMNS, TALL)
    live, wide = m < rows, n < columns
    k, half, g = tl.arange(0, INNER), tl.arange(0, INNER // 2), tl.arange(0, INNER // GROUP)
    r = tl.arange(0, RANK_BLOCK)
    n64 = n.to(tl.int64)
    first = tl.min(n, axis=0)
    layer = (first >= end0).to(tl.int32) + (first >= end1).to(tl.int32) + (first >= end2).to(tl.int32)
    x_at = x_ptr + (m.to(tl.int64) * x_stride)[:, None] + k[None, :]
    packed_at = packed_ptr + (n64 * packed_stride)[:, None] + half[None, :]
    scales_at = scales_ptr + (n64 * scales_stride)[:, None] + g[None, :]
    down_at = down_ptr + ((layer * RANK + r).to(tl.int64) * down_stride)[:, None] + k[None, :]
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    inner = tl.zeros([ROWS, RANK_BLOCK], dtype=tl.float32)
    for start in range(0, K, INNER):
        inside = k < K - start
        x = tl.load(x_at + start, mask=live[:, None] & inside[None, :], other=0.0)
        packed = tl.load(packed_at + start // 2, mask=wide[:, None] & (half < (K - start) // 2)[None, :], other=0x88)
        scale = tl.load(
            scales_at + start // GROUP, mask=wide[:, None] & (g < (K - start) // GROUP)[None, :], other=0.0
        ).to(tl.float32)
        pair = tl.join(packed & 15, packed >> 4)
        number = tl.reshape(pair, [COLUMNS, INNER // GROUP, GROUP]).to(tl.float32) - 8.0
        weight = tl.reshape(number * scale[:, :, None], [COLUMNS, INNER]).to(x.dtype)
        acc = tl.dot(x, tl.trans(weight), acc=acc, input_precision=PRECISION)
        if RANK > 0:
            down = tl.load(down_at + start, mask=(r < RANK)[:, None] & inside[None, :], other=0.0).to(x.dtype)
            inner = tl.dot(x, tl.trans(down), acc=inner, input_precision=PRECISION)
    if RANK > 0:
        rank_up = tl.load(
            rank_up_ptr + (n64 * rank_up_stride)[:, None] + r[None, :],
            mask=wide[:, None] & (r < RANK)[None, :],
            other=0.0,
        )
        at = out_ptr.dtype.element_ty
        acc = tl.dot(inner.to(at), tl.trans(rank_up.to(at)), acc=acc, input_precision=PRECISION)
    finish(
        acc, m, n, rows, columns, bias_ptr, low_ptr, up_ptr, out_ptr, low_stride, up_stride, out_stride,
        R, R_BLOCK, ADD, GELU, PRECISION,
    )  # fmt: skip


def int4_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    down: Tensor | None,
    rank_up: Tensor | None,
    heights: Sequence[int],
    add: bool,
    epilogue: Epilogue,
) -> None:
    """out = x weightᵀ + (x downᵀ) rank_upᵀ, with the epilogue: + low upᵀ + bias, through GELU if asked for.

    The weight's numbers are ``packed`` (two in a byte, less 8) times ``scales``, each rounded to x's dtype. Sums are in
    fp32; x downᵀ is rounded to x's dtype.

    Args:
        x: [rows, K], fp32, fp16 or bf16.
        packed: uint8 [columns, K / 2]; scales: bf16 [columns, K / group], see
            `mogle_rt.bundle.storage.Int4Storage`; the group is a power of two up to 64.
        down: bf16 [layers * rank, K], of up to four stacked layers; rank_up: bf16 [columns, rank]; or None.
        heights: columns of each stacked layer; their sum is ``columns``.
        add: whether to add to what is in ``out``, and not the bias: for the product of further columns of the weight.
        epilogue: what is added to the [rows, columns] products, and where the result is written, in x's dtype.

    Raises:
        ValueError: a shape, dtype, stride or device doesn't fit.
    """
    check_device(x)
    check_epilogue(epilogue, x, packed.shape[0])
    (rows, K), columns = x.shape, packed.shape[0]
    require(K % scales.shape[1] == 0, f"{scales.shape[1]} groups don't divide {K} columns")
    group = K // scales.shape[1]
    require(group in (2, 4, 8, 16, 32, 64), f"groups must have 2 to 64 columns, a power of two, got {group}")
    require(1 <= len(heights) <= 4 and sum(heights) == columns, f"heights must be one to four that add up to {columns}")
    check("out", epilogue.out, (rows, columns), x)
    check("packed", packed, (columns, K // 2), x, torch.uint8)
    check("scales", scales, (columns, K // group), x, torch.bfloat16)
    rank = 0
    if down is not None and rank_up is not None:
        rank = rank_up.shape[1]
        check("down", down, (len(heights) * rank, K), x, torch.bfloat16)
        check("rank_up", rank_up, (columns, rank), x, torch.bfloat16)
    if rows == 0 or columns == 0:
        return
    t = tiles(rows, columns, heights)
    require(
        not rank or all(height % t.columns == 0 for height in heights[:-1]),
        f"columns of stacked layers must be multiples of 16, got {list(heights)}",
    )
    ends = [sum(heights[: i + 1]) for i in range(len(heights) - 1)]
    ends += [columns] * (3 - len(ends))
    launch(
        _int4_linear_kernel,
        grid(epilogue, t),
        x,
        packed,
        scales,
        x if down is None else down,
        x if rank_up is None else rank_up,
        *ends,
        x.stride(0),
        packed.stride(0),
        scales.stride(0),
        0 if down is None else down.stride(0),
        0 if rank_up is None else rank_up.stride(0),
        *epilogue_arguments(epilogue),
        K=K,
        GROUP=group,
        RANK=rank,
        RANK_BLOCK=power_of_two(rank, 16),
        ADD=add,
        **epilogue_constants(epilogue, t),
    )


def int4_linear_ref(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    down: Tensor | None,
    rank_up: Tensor | None,
    heights: Sequence[int],
    add: bool,
    epilogue: Epilogue,
) -> None:
    """`int4_linear` by PyTorch in fp64, rounded where the kernel rounds."""
    numbers = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).double() - 8
    weight = (numbers.unflatten(1, (scales.shape[1], -1)) * scales.double()[..., None]).flatten(1)
    exact = x.double()
    y = exact @ weight.to(x.dtype).double().t()
    if down is not None and rank_up is not None:
        first, rank = 0, rank_up.shape[1]
        for number, height in enumerate(heights):
            part = down[number * rank : (number + 1) * rank]
            inner = (exact @ part.to(x.dtype).double().t()).to(x.dtype).double()
            rows = slice(first, first + height)
            y[:, rows] += inner @ rank_up[rows].to(x.dtype).double().t()
            first += height
    finish_ref(y, epilogue, add)


def int4_linear_cost(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    down: Tensor | None,
    rank_up: Tensor | None,
    heights: Sequence[int],
    add: bool,
    epilogue: Epilogue,
) -> KernelCost:
    """The least that `int4_linear` takes: each number is moved once."""
    (rows, K), columns = x.shape, packed.shape[0]
    flops = 2 * rows * columns * (K + epilogue.rank)
    if down is not None and rank_up is not None:
        flops += 2 * rows * (down.shape[0] * K + columns * rank_up.shape[1])
    out, added = epilogue.out, epilogue.out if add else epilogue.bias
    read = nbytes(x, packed, scales, down, rank_up, added, epilogue.low, epilogue.up)
    return KernelCost(read=read, written=nbytes(out), flops=flops)
