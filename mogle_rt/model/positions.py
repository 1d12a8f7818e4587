"""The positions of image and condition tokens, and the rotary table."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor


def token_ids(grid: tuple[int, int]) -> Tensor:
    """The ids (0, row, column) of the image tokens: [N, 3]."""
    rows, columns = torch.meshgrid(*(torch.arange(count, device="cpu") for count in grid), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


def condition_ids(ids: Tensor, position_delta: tuple[float, float], position_scale: float) -> Tensor:
    """The ids of the condition tokens, shifted and then scaled about the grid's corner (-½, -½). [N, 3] -> [N, 3]."""
    ids = ids.clone()
    ids[:, 1] += position_delta[0]
    ids[:, 2] += position_delta[1]
    if position_scale != 1:
        ids[:, 1:] = ids[:, 1:] * position_scale + (position_scale - 1) / 2
    return ids


ROPE_THETA = 10_000


def rope_table(ids: Tensor, axes_dims: tuple[int, ...]) -> Tensor:
    """The rotary embedding of token ids: [L, 3] -> complex64 [L, d / 2]. Angles are float64, on MPS float32."""
    precise = torch.float64 if ids.device.type != "mps" else torch.float32
    tables = [
        get_1d_rotary_pos_embed(dim, ids[:, axis].float(), theta=ROPE_THETA, use_real=False, freqs_dtype=precise)
        for axis, dim in enumerate(axes_dims)
    ]
    return torch.cat(tables, dim=-1).to(torch.complex64)
