"""The element-wise operations of the transformer, in PyTorch. Where fused kernels exist, they are chosen here."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LAYER_NORM_EPS = 1e-6
QK_NORM_EPS = 1e-6


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm(x) * scale + shift (AdaLN). x: [..., D]; scale (its 1 added) and shift broadcast against it."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS), scale)


# gelu(x) = x * sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3) = x * (GELU_A + GELU_B x^2) / 2
GELU_A = 2 * math.sqrt(2 / math.pi)
GELU_B = GELU_A * 0.044715
_GELU_A = torch.tensor(GELU_A)


def gelu_tanh(x: Tensor, out: Tensor | None = None) -> Tensor:
    """GELU in its tanh form, into ``out`` if given (it may be a slice of a longer buffer)."""
    if x.device.type != "cpu":
        if out is None:
            return F.gelu(x, approximate="tanh")
        return torch.ops.aten.gelu.out(x, approximate="tanh", out=out)
    # PyTorch's CPU kernel takes up to twice as long as these vectorised passes; the difference is in the last bits.
    gate = torch.addcmul(_GELU_A, x, x, value=GELU_B)
    return torch.mul(gate.mul_(x).sigmoid_(), x, out=out)


def addcmul_(x: Tensor, base: Tensor, scale: Tensor) -> Tensor:
    """x = base + x * scale, in place."""
    return torch.addcmul(base, x, scale, out=x)


def qk_norm(qk: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """RMSNorm over each head. qk: [B, L, P, H, d] (P of q, k), weight: [P, 1, d] -> the same shape.

    Into ``out`` if given: the rows of a stream in the joint sequence.
    """
    norm = torch.linalg.vector_norm(qk, dim=-1, keepdim=True, dtype=torch.float32)
    scale = norm.square_().mul_(1 / qk.shape[-1]).add_(QK_NORM_EPS).rsqrt_()
    normed = torch.mul(qk, scale, out=torch.empty_like(qk) if out is None else out)
    return normed.mul_(weight)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs. x: [B, L, P, H, d], rope: complex [L, 1, 1, d / 2] -> the same shape."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rope).view(x.shape).to(x.dtype)
