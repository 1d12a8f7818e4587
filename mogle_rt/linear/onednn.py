"""Linear layers by oneDNN, which PyTorch includes for CPUs but does not use for plain float32 products."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

# oneDNN is used for weights with at least this many elements. For these, with 32 to 2,560 rows, a product with a packed
# weight took 10 to 60 % less time than PyTorch's own product, and saved most with few rows; with a plain weight it took
# 0 to 30 % less. For smaller weights, either may take up to four times as long. (Measured only on an AMD EPYC, Zen 4,
# where PyTorch uses MKL.)
LEAST_WEIGHT = 1 << 17
# oneDNN packs a plain weight again in every call. With few rows this takes too long, and needs memory for a second
# weight, which is then much larger than the activations. So the number of rows must be at least this fraction of the
# weight's smaller dimension.
ROWS_A_CHANNEL = 1 / 8
PACKED_FOR = 64  # rows; the layout is the same for all but the very smallest numbers, and works for any number


def packs(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `pack` can handle a weight (out, in) of this dtype on this device, and it is large enough to benefit."""
    ours = device.type == "cpu" and dtype == torch.float32
    return ours and math.prod(shape) >= LEAST_WEIGHT and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def pack(weight: Tensor) -> Tensor:
    """A copy of a weight [out, in] in oneDNN's packed layout."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR)
    assert isinstance(packed, Tensor)
    return packed


def serves(weight: Tensor, rows: int) -> bool:
    """Whether `linear` is faster than PyTorch's own product for a weight [out, in] and this number of rows.

    A weight with gaps between its rows would work, but in code without vector instructions, hundreds of times slower.
    """
    if weight.is_mkldnn:
        return True
    ours = packs(weight.shape, weight.device, weight.dtype)
    return ours and weight.is_contiguous() and rows >= min(weight.shape) * ROWS_A_CHANNEL


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """x weightᵀ + bias, followed by GELU (tanh form) if ``gelu``. x: [rows, in]. weight: packed or plain."""
    y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "tanh")
    assert isinstance(y, Tensor)
    return y


@functools.cache
def plain_equals_packed() -> bool:
    """Whether products with plain and with packed weights have the same bytes, tried on a few shapes of several rows.

    They have with PyTorch 2.13, and have not with 2.11.
    """
    generator = torch.Generator().manual_seed(0)
    for rows, out, inner in ((33, 768, 272), (160, 1024, 256), (7, 256, 1024)):
        x, weight = (torch.randn(n, inner, generator=generator) for n in (rows, out))
        if not torch.equal(linear(x, weight), linear(x, pack(weight))):
            return False
    return True


def prepared(weight: Tensor, bias: Tensor | None, *, gelu: bool) -> Callable[..., Tensor]:
    """`linear` with all arguments but x bound."""
    return partial(linear, weight=weight, bias=bias, gelu=gelu)
