"""GELU in its tanh form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# gelu(x) = x * sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3) = x * (GELU_A + GELU_B x^2) / 2
GELU_A = 2 * math.sqrt(2 / math.pi)
GELU_B = GELU_A * 0.044715
_GELU_A = torch.tensor(GELU_A, dtype=torch.float32, device="cpu")
IN_CACHE = 1 << 18  # elements that the four passes treat at a time; with their scratch memory, 2 MiB in float32


def gelu(x: Tensor, scratch: Tensor, out: Tensor) -> Tensor:
    """Write GELU in its tanh form to ``out``, which may be x. scratch has the shape of x and may be overwritten."""
    if x.device.type != "cpu":
        torch.ops.aten.gelu.out(x, approximate="tanh", out=out)
        return out
    # PyTorch's CPU kernel takes up to twice as long as these vectorised passes; the difference is in the last bits.
    # All passes treat as many rows as fit into the cache, before they go on to the next rows.
    rows = max(1, IN_CACHE // x.shape[-1])
    gate = scratch[:rows]
    for part, into in zip(x.split(rows), out.split(rows), strict=True):
        some = torch.addcmul(_GELU_A, part, part, value=GELU_B, out=gate[: len(part)])
        torch.mul(part, some.mul_(part).sigmoid_(), out=into)
    return out
