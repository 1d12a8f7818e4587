"""Attention over [text, image, condition] with the reference's switches, in one launch and without a mask.

If all tokens see each other, PyTorch's fused attention (flash or cuDNN's, as PyTorch chooses) is the better choice,
because it uses the asynchronous pipelines of Hopper and Blackwell. But it cannot add a constant to the scores between two
groups of tokens. With it, that takes four calls and a merge by log-sum-exp; this kernel does it in one launch. Blocks of
keys that no row of a program sees are skipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mogle_rt.kernels.common import (
    KernelCost,
    check,
    check_device,
    interpreted,
    launch,
    power_of_two,
    precision,
    require,
)

LARGEST_HEAD = 256
JOINT, SEPARATE, INDEPENDENT, SCALED = (tl.constexpr(i) for i in range(4))
VISIBILITIES = {"joint": JOINT, "separate": SEPARATE, "independent": INDEPENDENT, "scaled": SCALED}
LOG2_E = tl.constexpr(math.log2(math.e))


@dataclass(frozen=True)
class Tiles:
    """The number of queries of a program, of keys of a loop step, of warps, and of loop steps that overlap."""

    queries: int
    keys: int
    warps: int
    stages: int


def tiles(length: int, width: int, dtype: torch.dtype) -> Tiles:
    """Tiles of 128 x 64 for heads of 128: two groups of warps for wgmma, or one tile for tcgen05.

    In fp32, tiles larger than 32 x 32 would spill.
    """
    if interpreted():
        return Tiles(min(power_of_two(length, 16), 128), min(power_of_two(length, 16), 128), 4, 1)
    if dtype == torch.float32:
        return Tiles(32 if width <= 128 else 16, 32, 8, 2)
    return Tiles(128, 64, 8, 2) if width <= 128 else Tiles(64, 32, 8, 2)


@triton.jit
def _joint_attention_kernel(
    q_ptr,  # [Lq, B, H, d]
    k_ptr,  # [L, B, H, d]
    v_ptr,
    out_ptr,  # [Lq, B, H * d]
    queries,
    keys,
    condition_from,  # first position of the condition
    heads,
    log_scale_ptr,  # fp32 [1]; with SCALED, added to the scores between the groups
    q_l,
    q_b,
    q_h,
    k_l,
    k_b,
    k_h,
    v_l,
    v_b,
    v_h,
    out_l,
    out_b,
    d: tl.constexpr,
    D_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    VISIBILITY: tl.constexpr,
    SCALE: tl.constexpr,  # of scores, in powers of two
    PRECISION: tl.constexpr,
):
    first = tl.program_id(0) * QUERIES
    image, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    row = first + tl.arange(0, QUERIES)
    c = tl.arange(0, D_BLOCK)
    q_mask = (row < queries)[:, None] & (c < d)[None, :]
    q_at = (row.to(tl.int64) * q_l + image * q_b + head * q_h)[:, None] + c[None, :]
    q = tl.load(q_ptr + q_at, mask=q_mask, other=0.0)

    if VISIBILITY == SCALED:
        bias = tl.load(log_scale_ptr) * LOG2_E

    # The keys that at least one row of this program sees.
    start, stop = 0, keys
    if VISIBILITY == SEPARATE:
        start = tl.where(first < condition_from, 0, condition_from)
        last = tl.minimum(first + QUERIES, queries)
        stop = tl.where(last > condition_from, keys, condition_from)
    elif VISIBILITY == INDEPENDENT:
        start = tl.where(first < condition_from, 0, condition_from)

    row_in_condition = (row >= condition_from)[:, None]
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, D_BLOCK], tl.float32)
    for block in range(start, stop, KEYS):
        key = block + tl.arange(0, KEYS)
        key_live = key < stop
        mask = key_live[:, None] & (c < d)[None, :]
        # The order of the pointers transposes the block: [d, keys].
        k_at = (key.to(tl.int64) * k_l + image * k_b + head * k_h)[None, :] + c[:, None]
        k = tl.load(k_ptr + k_at, mask=key_live[None, :] & (c < d)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * SCALE
        seen = key_live[None, :]
        if VISIBILITY != JOINT:
            key_in_condition = (key >= condition_from)[None, :]
            if VISIBILITY == SCALED:
                scores += tl.where(row_in_condition != key_in_condition, bias, 0.0)
            elif VISIBILITY == SEPARATE:
                seen = seen & (row_in_condition == key_in_condition)
            else:
                seen = seen & ((row_in_condition == key_in_condition) | key_in_condition)
        scores = tl.where(seen, scores, float("-inf"))
        now_largest = tl.maximum(largest, tl.max(scores, axis=1))
        # The largest score of a row that has seen no key yet is -inf. Any finite value in its place avoids NaN.
        finite = tl.where(now_largest == float("-inf"), 0.0, now_largest)
        weights = tl.exp2(scores - finite[:, None])
        before = tl.exp2(largest - finite)
        total = total * before + tl.sum(weights, axis=1)
        v_at = (key.to(tl.int64) * v_l + image * v_b + head * v_h)[:, None] + c[None, :]
        v = tl.load(v_ptr + v_at, mask=mask, other=0.0)
        out = tl.dot(weights.to(v.dtype), v, acc=out * before[:, None], input_precision=PRECISION)
        largest = now_largest

    out = out / tl.where(total == 0.0, 1.0, total)[:, None]  # rows after the last one have a total of 0
    out_at = (row.to(tl.int64) * out_l + image * out_b)[:, None] + head * d + c[None, :]
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=q_mask)


def joint_attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, condition_from: int, visibility: str, log_scale: Tensor
) -> None:
    """softmax(q k^T / sqrt(d) + bias) v, where positions decide on the bias and who sees whom (arXiv 2205.14135).

    Args:
        q: [Lq, B, H, d], the first Lq rows of the sequence or all of it; fp32, fp16 or bf16.
        k, v: [L, B, H, d] of q's dtype. The first three dimensions of q, k and v may have any strides.
        out: [Lq, B, >= H * d]; its first H * d columns are written.
        condition_from: first position of the condition, 0 … L; L means that there is none.
        visibility: "joint" (everything sees everything), "separate" (the condition and the rest don't see each
            other), "independent" (the rest sees the condition, the condition only itself) or "scaled"
            (``log_scale`` is added to the scores between the condition and the rest).
        log_scale: fp32 [1] on the GPU, read only for "scaled". It is read from memory so that a captured graph serves
            all values.

    Raises:
        ValueError: a shape, dtype, stride or device doesn't fit, the visibility is unknown, or rows would see nothing.
    """
    check_device(q)
    require(q.dim() == 4 and k.dim() == 4, f"q and k must be [L, B, H, d], got {list(q.shape)}, {list(k.shape)}")
    queries, B, H, d = q.shape
    keys = k.shape[0]
    require(0 < d <= LARGEST_HEAD, f"heads must have 1 to {LARGEST_HEAD} channels, got {d}")
    require(0 < queries <= keys, f"q must have 1 to {keys} rows, got {queries}")
    require(0 <= condition_from <= keys, f"condition_from must be 0 to {keys}, got {condition_from}")
    require(visibility in VISIBILITIES, f"visibility must be one of {', '.join(VISIBILITIES)}, got {visibility!r}")
    check("q", q, (queries, B, H, d), q)
    check("k", k, (keys, B, H, d), q)
    check("v", v, (keys, B, H, d), q)
    require(out.dim() == 3 and out.shape[-1] >= H * d, f"out must be [Lq, B, >= {H * d}], got {list(out.shape)}")
    check("out", out, (queries, B, out.shape[-1]), q)
    check("log_scale", log_scale, (1,), q, torch.float32)
    if B * H == 0:
        return
    kind = VISIBILITIES[visibility if condition_from < keys else "joint"].value
    t = tiles(queries, d, q.dtype)
    launch(
        _joint_attention_kernel,
        (triton.cdiv(queries, t.queries), B * H),
        q,
        k,
        v,
        out,
        queries,
        keys,
        condition_from,
        H,
        log_scale,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:2],
        d=d,
        D_BLOCK=power_of_two(d, 16),
        QUERIES=t.queries,
        KEYS=t.keys,
        VISIBILITY=kind,
        SCALE=d**-0.5 * LOG2_E.value,
        PRECISION=precision(q.dtype),
        num_warps=t.warps,
        num_stages=t.stages,
    )


def joint_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, condition_from: int, visibility: str, log_scale: Tensor
) -> None:
    """`joint_attention` by PyTorch with a dense bias, in fp32 (fp64 for fp64). Weights are rounded as in the kernel."""
    exact = torch.promote_types(q.dtype, torch.float32)
    queries, _, H, d = q.shape
    keys = k.shape[0]
    row_in = torch.arange(queries, device=q.device)[:, None] >= condition_from
    key_in = torch.arange(keys, device=q.device)[None, :] >= condition_from
    bias = torch.zeros(queries, keys, dtype=exact, device=q.device)
    if visibility == "scaled":
        bias = torch.where(row_in != key_in, log_scale.to(exact), bias)
    elif visibility == "separate":
        bias = bias.masked_fill(row_in != key_in, -torch.inf)
    elif visibility == "independent":
        bias = bias.masked_fill(row_in & ~key_in, -torch.inf)
    scores = torch.einsum("qbhd,kbhd->bhqk", q.to(exact), k.to(exact)) * d**-0.5 + bias
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    mixed = torch.einsum("bhqk,kbhd->qbhd", weights.to(q.dtype).to(exact), v.to(exact))
    out[..., : H * d] = (mixed / weights.sum(-1).permute(2, 0, 1)[..., None]).flatten(2)


def joint_attention_cost(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, condition_from: int, visibility: str, log_scale: Tensor
) -> KernelCost:
    """The least that `joint_attention` takes: q, k, v and the output once, and products over pairs that see each other."""
    queries, B, H, d = q.shape
    keys = k.shape[0]
    rest, condition = min(condition_from, queries), max(queries - condition_from, 0)
    pairs = queries * keys
    read_keys = keys
    if visibility == "separate":
        pairs = rest * condition_from + condition * (keys - condition_from)
        read_keys = (condition_from if rest else 0) + (keys - condition_from if condition else 0)
    elif visibility == "independent":
        pairs = rest * keys + condition * (keys - condition_from)
        read_keys = keys if rest else keys - condition_from
    row = B * H * d * q.element_size()
    scale = log_scale.nbytes if visibility == "scaled" else 0
    return KernelCost(read=(queries + 2 * read_keys) * row + scale, written=queries * row, flops=4 * pairs * B * H * d)
