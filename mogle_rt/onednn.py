"""Linear layers by oneDNN, which PyTorch carries for CPUs but doesn't take for plain float32 products."""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers of a weight. From here on it took 10 to 60 % less time than PyTorch's own product, from 16 rows to 2,560, most
# with few; with smaller weights up to four times as long. (Measured on an AMD EPYC, Zen 4, where PyTorch's own is MKL;
# on other CPUs it wasn't.)
LEAST_WEIGHT = 1 << 16
ROWS = 64  # that a weight is packed for; it is the same for any number but the very smallest, and serves all


def packs(weight: Tensor) -> bool:
    """Whether `pack` takes this weight [out, in], and it is large enough to be worth it."""
    ours = weight.device.type == "cpu" and weight.dtype == torch.float32
    return ours and weight.numel() >= LEAST_WEIGHT and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def pack(weight: Tensor) -> Tensor:
    """A copy of a weight [out, in] as oneDNN reads it, which it would else make in every product."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
    assert isinstance(packed, Tensor)
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """x weightᵀ + bias, through GELU in its tanh form if asked for. x: [rows, in]."""
    y = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "gelu" if gelu else "none", [], "tanh")
    assert isinstance(y, Tensor)
    return y
