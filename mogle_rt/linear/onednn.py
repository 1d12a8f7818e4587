"""Linear layers by oneDNN, which PyTorch carries for CPUs but doesn't take for plain float32 products."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

# Numbers of a weight. From here on a product with a packed weight took 10 to 60 % less time than PyTorch's own, from 32
# rows to 2,560, most with few; with a plain weight 0 to 30 % less. With smaller weights either may take longer, up to
# four times. (Measured on an AMD EPYC, Zen 4, where PyTorch's own is MKL; on other CPUs it wasn't.)
LEAST_WEIGHT = 1 << 17
# oneDNN packs a plain weight in every call. With too few rows that takes too long, and memory: a second weight, much
# larger than the activations. At least so many rows, then, for each of the weight's smaller side.
ROWS_A_CHANNEL = 1 / 8
PACKED_FOR = 64  # rows; the layout is the same for any number but the very smallest, and serves all


def packs(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `pack` takes a weight (out, in) of this dtype there, and it is large enough to be worth it."""
    ours = device.type == "cpu" and dtype == torch.float32
    return ours and math.prod(shape) >= LEAST_WEIGHT and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def pack(weight: Tensor) -> Tensor:
    """A copy of a weight [out, in] as oneDNN reads it."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR)
    assert isinstance(packed, Tensor)
    return packed


def serves(weight: Tensor, rows: int) -> bool:
    """Whether `linear` is the faster way for a weight [out, in] and so many rows.

    With gaps between a weight's rows it would work, but in code without vector instructions, hundreds of times slower.
    """
    if weight.is_mkldnn:
        return True
    ours = packs(weight.shape, weight.device, weight.dtype)
    return ours and weight.is_contiguous() and rows >= min(weight.shape) * ROWS_A_CHANNEL


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """x weightᵀ + bias, through GELU in its tanh form if asked for. x: [rows, in]. weight: packed or plain."""
    y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "tanh")
    assert isinstance(y, Tensor)
    return y


def prepared(weight: Tensor, bias: Tensor | None, *, gelu: bool) -> Callable[..., Tensor]:
    """`linear` of everything but x."""
    return partial(linear, weight=weight, bias=bias, gelu=gelu)
