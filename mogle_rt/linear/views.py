"""Views of buffers that have no gaps between their rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def empty_parameter(*shape: int) -> nn.Parameter:
    """A frozen parameter that is loaded later and takes no memory until then."""
    return nn.Parameter(torch.empty(*shape, device="meta"), requires_grad=False)


def flat(x: Tensor) -> Tensor:
    """[l, B, D] -> [l * B, D], always a view."""
    return x.view(x.shape[0] * x.shape[1], x.shape[2])


def first_columns(buffer: Tensor, length: int, columns: int) -> Tensor:
    """A contiguous view [length, B, columns] of the beginning of a contiguous buffer [L, B, D]."""
    batch = buffer.shape[1]
    return buffer.view(-1)[: length * batch * columns].view(length, batch, columns)
