"""GELU in its tanh form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# gelu(x) = x * sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3) = x * (GELU_A + GELU_B x^2) / 2
GELU_A = 2 * math.sqrt(2 / math.pi)
GELU_B = GELU_A * 0.044715
_GELU_A = torch.tensor(GELU_A)


def gelu_(x: Tensor, scratch: Tensor) -> None:
    """GELU in its tanh form, in place. scratch: as x; it may be overwritten."""
    if x.device.type == "cpu":
        # PyTorch's CPU kernel takes up to twice as long as these vectorised passes; the difference is in the last bits.
        gate = torch.addcmul(_GELU_A, x, x, value=GELU_B, out=scratch)
        x.mul_(gate.mul_(x).sigmoid_())
    else:
        torch.ops.aten.gelu_(x, approximate="tanh")
