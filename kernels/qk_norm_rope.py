"""RMSNorm of q and k and then their rotary embedding, in place in the buffer of the joint projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mogle_rt.kernels.common import (
    KernelCost,
    check,
    check_bounds,
    check_device,
    check_rows,
    group_rows,
    interpreted,
    launch,
    power_of_two,
    require,
)

EPS = tl.constexpr(1e-6)
LARGEST_HEAD = 512


@dataclass(frozen=True)
class Tiles:
    """The number of rows of a program, of heads of one of its loop steps, and of warps."""

    rows: int
    heads: int
    warps: int


def tiles(rows: int, heads: int, width: int) -> Tiles:
    """One row per program, so that its cosines are read once. A step of 1024 values is one vector load per thread."""
    if interpreted():
        return Tiles(min(power_of_two(rows), 256), power_of_two(heads), 4)
    return Tiles(1, max(1, min(power_of_two(heads), 1024 // power_of_two(width))), 4)


@triton.jit
def _qk_norm_rope_kernel(
    x_ptr,  # [rows, P, H, d]; parts 0 to W - 1 are changed
    weight_ptr,  # [G, W, d]
    rope_ptr,  # fp32 [L, d]: d / 2 cosines, then d / 2 sines
    rows,
    batch,
    end0,  # first position of the second group
    end1,  # first position of the third group
    x_stride,
    part_stride,
    head_stride,
    weight_g,
    weight_w,
    rope_stride,
    W: tl.constexpr,
    H: tl.constexpr,
    HALF: tl.constexpr,  # d / 2
    HALF_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = r < rows
    position = r // batch
    group = (position >= end0).to(tl.int64) + (position >= end1).to(tl.int64)
    start = r.to(tl.int64) * x_stride

    half = tl.arange(0, HALF_BLOCK)
    half_mask = live[:, None] & (half < HALF)[None, :]
    angle = rope_ptr + (position.to(tl.int64) * rope_stride)[:, None] + half[None, :]
    cos = tl.load(angle, mask=half_mask, other=0.0)[:, None, :]  # [ROWS, 1, HALF_BLOCK]
    sin = tl.load(angle + HALF, mask=half_mask, other=0.0)[:, None, :]

    cols = tl.arange(0, 2 * HALF_BLOCK)
    for part in tl.static_range(W):
        weight_at = weight_ptr + (group * weight_g)[:, None] + part * weight_w + cols[None, :]
        weight_mask = live[:, None] & (cols < 2 * HALF)[None, :]
        weight = tl.load(weight_at, mask=weight_mask, other=0.0).to(tl.float32)[:, None, :]
        for first in tl.static_range(0, H, HEADS):
            h = first + tl.arange(0, HEADS)
            at = start[:, None] + part * part_stride + h[None, :] * head_stride
            at = at[:, :, None] + cols[None, None, :]
            mask = live[:, None, None] & (h < H)[None, :, None] & (cols < 2 * HALF)[None, None, :]
            x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
            square = tl.sum(x * x, axis=2) / (2 * HALF)
            x = x * tl.rsqrt(square + EPS)[:, :, None] * weight
            even, odd = tl.split(tl.reshape(x, [ROWS, HEADS, HALF_BLOCK, 2]))
            x = tl.join(even * cos - odd * sin, even * sin + odd * cos)
            x = tl.reshape(x, [ROWS, HEADS, 2 * HALF_BLOCK])
            tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=mask)


def qk_norm_rope(x: Tensor, norm_weight: Tensor, bounds: Sequence[int], rope: Tensor) -> None:
    """RMSNorm (eps 1e-6) over d of the first W parts, then rotation of channel pairs (2i, 2i + 1), in place.

    The remaining parts (v) are neither read nor moved, because attention reads them where they lie. The rotary
    embedding is that of RoFormer, arXiv 2104.09864, equation 34.

    Args:
        x: [L, B, P, H, d], d even; fp32, fp16 or bf16; rows have one common stride, the last dimension has stride 1.
        norm_weight: [G, W, d], W <= P, of x's dtype.
        bounds: the ends of the G = 1 … 3 groups of positions, in ascending order; the last is L.
        rope: fp32 [L, d], in each row d / 2 cosines and then d / 2 sines.

    Raises:
        ValueError: a shape, dtype, stride or device doesn't fit.
    """
    check_device(x)
    require(x.dim() == 5 and norm_weight.dim() == 3, f"x must be [L, B, P, H, d], got {list(x.shape)}")
    L, B, P, H, d = x.shape
    W = norm_weight.shape[1]
    require(W <= P, f"x has {P} parts, norm_weight {W}")
    require(d % 2 == 0 and 0 < d <= LARGEST_HEAD, f"heads must have an even size up to {LARGEST_HEAD}, got {d}")
    check("x", x, (L, B, P, H, d), x)
    check("norm_weight", norm_weight, (len(bounds), W, d), x)
    check("rope", rope, (L, d), x, torch.float32)
    end0, end1 = check_bounds(bounds, L)
    stride = check_rows("x", x)
    rows = L * B
    if rows == 0 or H == 0:
        return
    t = tiles(rows, H, d)
    launch(
        _qk_norm_rope_kernel,
        (triton.cdiv(rows, t.rows),),
        x,
        norm_weight,
        rope,
        rows,
        B,
        end0,
        end1,
        stride,
        x.stride(2),
        x.stride(3),
        norm_weight.stride(0),
        norm_weight.stride(1),
        rope.stride(0),
        W=W,
        H=H,
        HALF=d // 2,
        HALF_BLOCK=power_of_two(d // 2),
        ROWS=t.rows,
        HEADS=t.heads,
        num_warps=t.warps,
    )


def qk_norm_rope_ref(x: Tensor, norm_weight: Tensor, bounds: Sequence[int], rope: Tensor) -> None:
    """`qk_norm_rope` by PyTorch in fp32 (fp64 for fp64), rounded once at the end."""
    exact = torch.promote_types(x.dtype, torch.float32)
    W, d = norm_weight.shape[1:]
    cos, sin = rope.to(exact)[:, None, None, None].chunk(2, dim=-1)  # [L, 1, 1, 1, d / 2]
    parts = x[:, :, :W]
    normed = parts.to(exact)
    normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + EPS.value)
    for rows, weight in zip(group_rows(bounds), norm_weight.to(exact), strict=True):
        normed[rows] *= weight[:, None]
    even, odd = normed.unflatten(-1, (d // 2, 2)).unbind(-1)
    parts.copy_(torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2))


def qk_norm_rope_cost(x: Tensor, norm_weight: Tensor, bounds: Sequence[int], rope: Tensor) -> KernelCost:
    """The least that `qk_norm_rope` takes: q and k are read and written; the table and the used weights are read once."""
    L, B, _, H, d = x.shape
    W = norm_weight.shape[1]
    moved = L * B * W * H * d * x.element_size()
    weights = sum(rows.start < rows.stop for rows in group_rows(bounds)) * W * d * x.element_size()
    return KernelCost(read=moved + weights + (L * d * 4 if moved else 0), written=moved, flops=0)
