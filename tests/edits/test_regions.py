"""Which pixels an edit may change: the weights are exactly 0 and 1 at the distances that the documentation states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mogle_rt.edits.regions import (
    changed_region,
    check_margin,
    class_numbers,
    default_margin,
    in_both,
    latent_weights,
    pixel_weights,
)
from mogle_rt.errors import InputError

pytestmark = pytest.mark.quick


def distances(region: NDArray[np.bool_]) -> NDArray[np.integer[Any]]:
    """From each pixel to the nearest one of the region, in a chess king's moves."""
    rows, columns = np.nonzero(region)
    y, x = np.indices((*region.shape, 1))[:2]
    away: NDArray[np.integer[Any]] = np.maximum(abs(y - rows), abs(x - columns)).min(-1)
    return away


@pytest.mark.parametrize(("margin", "feather"), [(0, 0), (1, 1), (5, 0), (5, 2), (6, 3), (8, 8), (40, 20)])
def test_weights_follow_the_distance(margin: int, feather: int) -> None:
    region = np.zeros((32, 120), dtype=np.bool_)
    region[3:6, 20:30] = region[25, 2] = region[31, 47] = True
    weights = pixel_weights(region, margin, feather).numpy()[0]
    away = distances(region)
    assert weights.shape == region.shape
    assert (weights[away <= margin - feather] == 1).all()
    assert (weights[away > margin] == 0).all()
    assert (weights >= 0).all()
    assert (weights <= 1).all()
    between = weights[(away > margin - feather // 2 * 2) & (away <= margin)]
    assert (between > 0).all()
    if feather > 1 and between.size:
        assert (between < 1).any()


def test_an_empty_region_changes_nothing() -> None:
    assert not pixel_weights(np.zeros((16, 16), dtype=np.bool_), 8, 4).any()


def test_regions_are_differences_and_named_classes() -> None:
    before, after = np.array([[0, 1, 13, 13]], dtype=np.uint8), np.array([[0, 13, 13, 1]], dtype=np.uint8)
    assert changed_region(before, after, []).tolist() == [[False, True, False, True]]
    assert changed_region(before, after, [13]).tolist() == [[False, True, True, True]]
    assert changed_region(before, after, [0]).tolist() == [[True, True, False, True]]
    assert in_both(before, after, [13, 1]).tolist() == [[False, True, True, True]]
    assert in_both(before, after, [13]).tolist() == [[False, False, True, False]]


def test_a_latent_changes_if_one_of_its_pixels_does() -> None:
    weights = torch.zeros(1, 1, 16, 24)
    weights[0, 0, 7, 8], weights[0, 0, 15, 23] = 0.5, 1.0
    assert latent_weights(weights).tolist() == [[[[0, 0.5, 0], [0, 0, 1]]]]


def test_names_of_classes() -> None:
    assert class_numbers("keep", "hair, hat") == [13, 14]
    assert class_numbers("keep", ["nose"]) == [2]
    assert class_numbers("keep", []) == []
    with pytest.raises(InputError, match="regions: there is no class 'hairs'; did you mean 'hair'"):
        class_numbers("regions", "hairs")
    with pytest.raises(InputError, match="keep: there is no class 13; the classes are background, skin"):
        class_numbers("keep", [13])  # type: ignore[list-item]


def test_margins() -> None:
    assert [default_margin(side, 2 * side) for side in (64, 128, 512, 1024)] == [8, 8, 16, 32]
    for margin, feather, message in (
        (-1, 0, "margin must be a whole number of pixels from 0 to 4096, got -1"),
        (2.5, 0, "margin must be a whole number"),
        (4, 5, "feather can be at most the margin, 4, got 5"),
    ):
        with pytest.raises(InputError, match=message):
            check_margin(margin, feather)  # type: ignore[arg-type]
