"""The rotation that spreads outliers over the columns of a group (ConvRot, arXiv 2512.03673).

A few columns of FLUX's activations are far larger than the others, and would decide the scale of a row in which all
others then have few steps left. The regular Hadamard matrix mixes the columns of a group: all its entries have one size,
and, unlike Sylvester's, no column of it sums a whole group up, where a common offset would become an outlier itself.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

H4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


@functools.lru_cache(maxsize=16)
def regular_hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """R [size, size]: the Kronecker power of ½ H4. It is symmetric and its own inverse; its entries ± 1 / sqrt(size) are
    exact in every floating point dtype.

    Args:
        size: 1, 4, 16, 64 or 256.
    """
    with torch.inference_mode(False):
        step = torch.tensor(H4, dtype=torch.float32, device="cpu") / 2
        made = torch.ones(1, 1, dtype=torch.float32, device="cpu")
        while len(made) < size:
            made = torch.kron(made, step)
        assert len(made) == size, f"there is no regular Hadamard matrix of size {size} here"
        return made.to(device, dtype)


def rotate(x: Tensor, size: int, out: Tensor | None = None) -> Tensor:
    """Every group of ``size`` columns of x, multiplied by R; into ``out``, whose rows may have gaps between them.

    Rotating twice gives x back, and the product of rotated rows with a rotated weight is that of the plain ones.

    Args:
        x: [rows, columns], of which ``size`` divides the columns.
    """
    if size == 1:
        return x if out is None else out.copy_(x)
    matrix = regular_hadamard(size, x.device, x.dtype)
    groups = x.unflatten(-1, (-1, size))
    if out is None:
        return torch.matmul(groups, matrix).flatten(-2)
    if out.is_contiguous():
        torch.mm(groups.reshape(-1, size), matrix, out=out.view(-1, size))
        return out
    return out.copy_(torch.matmul(groups, matrix).flatten(-2))
