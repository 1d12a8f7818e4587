"""Distinct pictures and their index stand for the stacked pictures exactly; pictures are compared bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mogle_rt.encoders.mask_planes import MaskPlanes


def stacked(*rows: str) -> Tensor:
    """Pictures [B, 4, 2, 3], one for each letter; equal letters give equal pictures."""
    pictures = {letter: torch.randn(2, 3) for letter in sorted(set("".join(rows)))}
    return torch.stack([torch.stack([pictures[letter] for letter in row]) for row in rows])


def test_equal_pictures_are_one_plane() -> None:
    latents = stacked("abcc", "acdc")
    masks = MaskPlanes.from_stacked(latents)
    assert masks.index.tolist() == [[0, 1, 2, 2], [0, 2, 3, 2]]
    assert (masks.batch, masks.tokens, len(masks.planes)) == (2, 2, 4)
    assert torch.equal(masks.stacked(), latents)
    assert torch.equal(masks.seen_by(1), latents[:, 1])
    assert torch.equal(masks.repeated(6).stacked(), latents.repeat_interleave(3, dim=0))
    assert masks.repeated(6).planes is masks.planes


def test_pictures_are_compared_bit_by_bit() -> None:
    """NaN is equal to itself, and zero is not minus zero."""
    x = torch.zeros(1, 4, 2, 3, dtype=torch.bfloat16)
    x[0, 1, 1, 2], x[0, 2, 0, 0] = float("nan"), -0.0
    x[0, 3] = x[0, 1]
    assert MaskPlanes.from_stacked(x).index.tolist() == [[0, 1, 2, 1]]
    assert MaskPlanes.from_stacked(x.to("meta")).index.tolist() == [[0, 1, 2, 3]]


def test_the_dtype_is_the_planes() -> None:
    masks = MaskPlanes.from_stacked(stacked("aab")).to(torch.device("cpu"), torch.float64)
    assert masks.planes.dtype == masks.stacked().dtype == torch.float64


@pytest.mark.parametrize(
    ("planes", "index", "message"),
    [
        ((2, 3), [[0]], r"planes must be \[P, N, 64\], got \[2, 3\]"),
        ((1, 2, 3), [0], r"index must be integers \[B, 20\], got int32 \[1\]"),
        ((1, 2, 3), [[0, 1]], "index must name planes 0 to 0, got 0 to 1"),
        ((1, 2, 3), [[-1, 0]], "index must name planes 0 to 0, got -1 to 0"),
    ],
)
def test_misfits_are_refused(planes: tuple[int, ...], index: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskPlanes(torch.zeros(planes), np.array(index, dtype=np.int32))
    with pytest.raises(ValueError, match="got float64"):
        MaskPlanes(torch.zeros(1, 2, 3), np.zeros((1, 2)))  # type: ignore[arg-type]
