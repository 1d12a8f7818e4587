"""Linear layers by oneDNN, which PyTorch carries for CPUs but doesn't take for plain float32 products."""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers of a weight. From here on it took 0 to 30 % less time than PyTorch's own product, from 32 rows to 2,560, in
# each of several processes, with GELU 10 to 40 %; with smaller weights up to a third more. (Measured on an AMD EPYC,
# Zen 4, where PyTorch's own is MKL; on other CPUs it wasn't.)
LEAST_WEIGHT = 1 << 17
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
    enough = weight.numel() >= LEAST_WEIGHT and rows >= min(weight.shape) * ROWS_A_CHANNEL
    return enough and available(weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """x weightᵀ + bias, through GELU in its tanh form if asked for. x: [rows, in]."""
    y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "tanh")
    assert isinstance(y, Tensor)
    return y
