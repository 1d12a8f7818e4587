"""Linear layers by oneDNN, which PyTorch carries for CPUs but doesn't take for plain float32 products."""

from __future__ import annotations

import torch
from torch import Tensor

# Multiplications. From here on it took 10 to 20 % less time than PyTorch's own product, whatever the layer; with less
# to do it took between 10 % less and twice as long, from one process to the next. (Measured on an AMD EPYC,
# Zen 4, where PyTorch's own is MKL; on other CPUs it wasn't.)
LEAST_WORK = 1 << 30
# oneDNN lays the weight out anew in every call. With too few rows that takes too long, and memory: a second weight,
# much larger than the activations. At least so many rows, then, for each of the weight's smaller side.
ROWS_A_CHANNEL = 1 / 8


def available(weight: Tensor) -> bool:
    """Whether `linear` takes this weight, [out, in].

    With gaps between its rows it would, but in code without vector instructions, hundreds of times slower.
    """
    ours = weight.device.type == "cpu" and weight.dtype == torch.float32
    return ours and weight.is_contiguous() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def serves(weight: Tensor, rows: int) -> bool:
    """Whether `linear` is the faster way for a weight [out, in] and so many rows."""
    enough = rows * weight.numel() >= LEAST_WORK and rows >= min(weight.shape) * ROWS_A_CHANNEL
    return enough and available(weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """x weightᵀ + bias, through GELU in its tanh form if asked for. x: [rows, in]."""
    y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "tanh")
    assert isinstance(y, Tensor)
    return y
