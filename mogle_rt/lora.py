"""A linear layer whose low-rank branch acts on the last rows only (the condition's; REFERENCE: LoRA on the branch)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def empty_parameter(*shape: int) -> nn.Parameter:
    """A frozen parameter whose values are loaded later."""
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class LoraLinear(nn.Module):
    """y = x Wᵀ + b for every row, and + x A B for rows ``lora_from`` to the end.

    One product with the base weight serves image and condition rows alike; the branch is added into its result in
    place, over its own rows. (The layers of q, k and v are one such layer: their A lie side by side, B is
    block-diagonal.) A is [in, R] and B [R, out], the transposes of what LoRA files hold.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.weight = empty_parameter(out_features, in_features)
        self.bias = empty_parameter(out_features)
        self.lora_down = empty_parameter(in_features, rank)
        self.lora_up = empty_parameter(rank, out_features)

    def forward(self, x: Tensor, lora_from: int) -> Tensor:
        """x: [B, L, in] -> [B, L, out]."""
        y = F.linear(x, self.weight, self.bias)
        add_lora_(y, x, self.lora_down, self.lora_up, lora_from)
        return y


def add_lora_(y: Tensor, x: Tensor, down: Tensor, up: Tensor, rows_from: int) -> None:
    """y += x A B in place, for rows ``rows_from`` to the end. x: [B, L, in], y: [B, L, out]."""
    batch, length, _ = x.shape
    if rows_from >= length:
        return
    if batch == 1:
        y[0, rows_from:].addmm_(torch.mm(x[0, rows_from:], down), up)
    else:
        low = torch.bmm(x[:, rows_from:], down.expand(batch, -1, -1))
        y[:, rows_from:].baddbmm_(low, up.expand(batch, -1, -1))
