"""Joint attention over [text, image, condition], with the reference's switches (REFERENCE: attention variants).

Each switch treats all tokens of a group alike, and there are two groups: the condition and the rest. So a switch only
chooses which groups are attended to, and `condition_scale` only adds a constant between the groups. A mask of [L, L] is
never needed.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mogle_rt.config import ModelConfig
from mogle_rt.torch_api.private import cpu_attention, efficient_attention, flash_attention

# The number of queries handled at once on devices without an attention kernel. With a fixed number, memory grows with
# the length of the sequence and not with its square.
PLAIN_QUERIES = 256
# Up to this many tokens on a CPU, plain products that keep all scores take 2 to 40 % less time than PyTorch's fused
# attention (measured with 4 heads of 64 and 24 of 128; the gain is largest where cores share no cache). From 800 tokens
# on, they take as long or longer.
WHOLE_SCORES = 640


class Visibility(enum.Enum):
    """Which group of tokens may attend to which."""

    JOINT = "joint"  # everything sees everything
    SEPARATE = "separate"  # the condition and the rest don't see each other
    INDEPENDENT = "independent"  # the rest sees the condition, the condition only itself
    SCALED = "scaled"  # everything sees everything, with log(scale) added between the groups

    @classmethod
    def of(cls, model: ModelConfig, condition_scale: float) -> Visibility:
        """As in the reference, a condition_scale other than 1 overrides both switches; 0 separates the groups."""
        if condition_scale not in (0, 1):
            return cls.SCALED
        if condition_scale == 0:
            return cls.SEPARATE
        if model.independent_condition:
            return cls.INDEPENDENT
        return cls.JOINT if model.union_cond_attn else cls.SEPARATE


@dataclass(frozen=True)
class AttentionPlan:
    """Who sees whom, and how strongly.

    The strength is read from memory on each run, so that one captured graph works for every condition_scale.

    Attributes:
        log_scale: float32 [1] on the device of q, log(condition_scale); read only where visibility is SCALED.
    """

    visibility: Visibility
    log_scale: Tensor


def log_scale_of(condition_scale: float, device: torch.device) -> Tensor:
    """`AttentionPlan.log_scale` for a condition_scale >= 0. For scale 0 it is 0, since nothing reads it then."""
    return torch.tensor([math.log(condition_scale) if condition_scale > 0 else 0.0], dtype=torch.float32, device=device)


def joint_attention(q: Tensor, k: Tensor, v: Tensor, condition_from: int, plan: AttentionPlan) -> Tensor:
    """Attention of ``q`` over ``k`` and ``v``.

    Args:
        q: [Lq, B, H, d], the first Lq rows of the joint sequence or all of it; or image rows alone.
        k, v: [L, B, H, d] in the order [text, image, condition].
        condition_from: the first row of the condition; L where there is none.
        plan: who sees whom.

    Returns:
        [Lq, B, H * d].
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    c = condition_from
    if plan.visibility is Visibility.JOINT or c >= k.shape[2]:
        return _rows(F.scaled_dot_product_attention(q, k, v))
    rest_q, condition_q = q[:, :, :c], q[:, :, c:]
    rest_kv, condition_kv = (k[:, :, :c], v[:, :, :c]), (k[:, :, c:], v[:, :, c:])
    if plan.visibility is Visibility.SCALED:
        rest = _merged(rest_q, rest_kv, condition_kv, plan.log_scale)
        condition = _merged(condition_q, condition_kv, rest_kv, plan.log_scale)
    else:
        seen = (k, v) if plan.visibility is Visibility.INDEPENDENT else rest_kv
        rest = F.scaled_dot_product_attention(rest_q, *seen)
        condition = F.scaled_dot_product_attention(condition_q, *condition_kv)
    if condition_q.shape[2] == 0:
        return _rows(rest)
    return torch.cat([_rows(rest), _rows(condition)])


def scores_shape(device: str, dtype: torch.dtype, heads: int, rows: int) -> tuple[int, int, int] | None:
    """The shape of `scores_room` on a kind of device, or None."""
    return (heads, rows, rows) if device == "cpu" and dtype == torch.float32 and rows <= WHOLE_SCORES else None


def scores_room(like: Tensor, heads: int, rows: int) -> Tensor | None:
    """Scratch memory [H, L, L] for `attention_by_products`, with L = rows, or None where that way is not faster."""
    shape = scores_shape(like.device.type, like.dtype, heads, rows)
    return None if shape is None else like.new_empty(shape)


def attention_by_products(
    q: Tensor, k: Tensor, v: Tensor, condition_from: int, plan: AttentionPlan, scores: Tensor, out: Tensor
) -> Callable[[], Tensor]:
    """Prepare `joint_attention` for these tensors; it computes the scores, their softmax and the product with ``v``.

    The returned function writes its result to ``out`` and returns it.

    Args:
        scores: scratch memory from `scores_room`; it is overwritten.
        out: [Lq, B, H * d].
    """
    (rows, B, H, d), c = q.shape, condition_from
    everything, rest, condition = slice(None), slice(c), slice(c, None)
    spans = [(everything, everything)]
    if plan.visibility in (Visibility.SEPARATE, Visibility.INDEPENDENT):
        seen_by_rest = rest if plan.visibility is Visibility.SEPARATE else everything
        spans = [(rest, seen_by_rest), (condition, condition)]
    parts = []
    for own, seen in spans:
        queries, keys, values, into = q[own], k[seen], v[seen], out.view(rows, B, H, d)[own]
        if len(queries) == 0:
            continue
        room = scores.view(-1)[: H * len(queries) * len(keys)].view(H, len(queries), len(keys))
        between = [room[:, :c, c:], room[:, c:, :c]] if plan.visibility is Visibility.SCALED else []
        for i in range(B):
            q_i, v_i, out_i = (x[:, i].transpose(0, 1) for x in (queries, values, into))
            parts.append((q_i, keys[:, i].permute(1, 2, 0), v_i, room, between, out_i))

    def run() -> Tensor:
        for q_i, k_i, v_i, room, between, out_i in parts:
            torch.baddbmm(room, q_i, k_i, beta=0, alpha=d**-0.5, out=room)
            for some in between:
                some.add_(plan.log_scale)
            torch.softmax(room, -1, out=room)
            out_i.copy_(torch.bmm(room, v_i))
        return out

    return run


def _rows(out: Tensor) -> Tensor:
    """[B, H, L, d] -> [L, B, H * d], contiguous. Often without a copy: kernels write [B, L, H, d] or [L, B, H, d]."""
    return out.permute(2, 0, 1, 3).flatten(2).contiguous()


def _merged(q: Tensor, own: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], log_scale: Tensor) -> Tensor:
    """Attention over both groups, with ``log_scale`` added to the scores of the other group.

    Each group is attended to alone, and the results are joined. With l the log-sum-exp of a group's scores, the joint
    softmax gives the other group the total weight
    sigmoid(l_other + log_scale - l_own).
    """
    if q.shape[2] == 0:
        return q
    own_out, own_lse = attention_with_lse(q, *own)
    other_out, other_lse = attention_with_lse(q, *other)
    weight = torch.sigmoid(other_lse + log_scale - own_lse).to(q.dtype)
    return torch.lerp(own_out, other_out, weight[..., None])


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of its scaled scores. q: [B, H, Lq, d] -> [B, H, Lq, d], fp32 [B, H, Lq]."""
    if q.device.type == "cpu":
        return cpu_attention(q, k, v)
    if q.device.type in ("cuda", "meta"):  # the meta device stands for a GPU
        out, lse = flash_attention(q, k, v) if _flash_takes(q) else efficient_attention(q, k, v)
        return out, lse[:, :, : q.shape[2]]  # the efficient kernel pads its rows
    parts = [plain_attention_with_lse(some, k, v) for some in q.split(PLAIN_QUERIES, dim=2)]
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)


def _flash_takes(q: Tensor) -> bool:
    """Whether the flash kernel runs on this tensor's GPU: 16 bits, Ampere or newer (so is the meta device)."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return False
    return q.is_meta or torch.cuda.get_device_capability(q.device)[0] >= 8


def plain_attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`attention_with_lse` in full precision, without a kernel. It keeps all scores, so call it with few queries."""
    scores = (q.float() @ k.float().transpose(-1, -2)) / math.sqrt(q.shape[-1])
    lse = scores.logsumexp(-1)
    return (torch.exp(scores - lse[..., None]) @ v.float()).to(q.dtype), lse
