"""Times the encoding of masks: a new mask, the same mask again, and the mask after an edit of one region.

The edit moves pixels from one class to another. The VAE has FLUX's shape, with a quarter of its channels.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import ModelsOf
from benchmarks.side_by_side import SideBySide
from benchmarks.sizes import cut_hair
from mogle_rt.masks import Labels, resize


@pytest.mark.parametrize("case", ["first time", "same mask again", "one region edited"])
def test_mask(case: str, models: ModelsOf, mask: Labels, compare: SideBySide) -> None:
    side, pixels = models("quarter VAE"), 256
    before = resize(mask, pixels, pixels)
    now = cut_hair(before) if case == "one region edited" else before

    def engine() -> Tensor:
        return side.pipeline.conditioner([now]).stacked()

    def baseline() -> Tensor:
        return side.baseline.encode_mask(torch.from_numpy(now).to(side.device))

    def arrange() -> None:
        side.forget_masks()
        if case != "first time":
            side.pipeline.conditioner([before])

    latents = 20 * (pixels // 16) ** 2 * 64 * side.dtype.itemsize
    # The first encoding takes seconds on either side, and the two are close: more rounds are needed to tell them apart.
    budget = 30.0 if case == "first time" else 4.0
    compare("mask", f"{case}, {pixels} px", engine, baseline, before=arrange, moved=2 * latents, budget=budget)
