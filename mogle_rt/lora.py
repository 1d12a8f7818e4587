"""A linear layer whose low-rank branch acts on the last rows only (the condition's; REFERENCE: LoRA on the branch)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def empty_parameter(*shape: int) -> nn.Parameter:
    """A frozen parameter whose values are loaded later."""
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class LoraLinear(nn.Module):
    """y = x Wᵀ + b for every row, and + (x Aᵀ) Bᵀ for rows ``lora_from`` to the end.

    One product with the base weight serves image and condition rows alike; the branch is added into its result in
    place, over its own rows. (The layers of q, k and v are one such layer: their A are stacked, B is block-diagonal.)
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.weight = empty_parameter(out_features, in_features)
        self.bias = empty_parameter(out_features)
        self.lora_down = empty_parameter(rank, in_features)
        self.lora_up = empty_parameter(out_features, rank)

    def forward(self, x: Tensor, lora_from: int) -> Tensor:
        """x: [B, L, in] -> [B, L, out]."""
        y = F.linear(x, self.weight, self.bias)
        add_lora(y[:, lora_from:], x[:, lora_from:], self.lora_down, self.lora_up)
        return y


def add_lora(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> None:
    """y += (x downᵀ) upᵀ in place. x: [B, L, in], y: [B, L, out], both perhaps slices of longer buffers."""
    if x.shape[1] == 0:
        return
    if x.shape[0] == 1:
        y[0].addmm_(x[0] @ down.t(), up.t())
    else:
        batch = x.shape[0]
        y.baddbmm_(torch.bmm(x, down.t().expand(batch, -1, -1)), up.t().expand(batch, -1, -1))
