"""Regions, drift and pictures: against other people's code, and against cases that a person can count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.functional.image import peak_signal_noise_ratio

from mogle_rt.config import NUM_CLASSES
from mogle_rt.errors import InputError
from mogle_rt.quality import drift
from mogle_rt.quality.pictures import read_picture, resized, to_tensor
from mogle_rt.quality.regions import Overlap, face_like, iou


def labels(seed: int, n: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, NUM_CLASSES - 2, (n, 16, 12)).astype(np.uint8)


def pictures(seed: int, n: int = 3, side: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3)).astype(np.uint8)


def test_iou_is_torchmetrics() -> None:
    found, wanted = labels(0), labels(1)
    metric = MulticlassJaccardIndex(NUM_CLASSES, average=None)
    want = metric(torch.from_numpy(found).long(), torch.from_numpy(wanted).long())
    got = iou(found, wanted)
    assert set(got) == set(range(NUM_CLASSES - 2))  # the last two classes are in no mask
    for c, value in got.items():
        assert value == pytest.approx(float(want[c]), rel=1e-6)


def test_iou_and_accuracy_of_one_image() -> None:
    wanted = np.array([[[0, 0, 1, 1]]], np.uint8)
    found = np.array([[[0, 1, 1, 2]]], np.uint8)
    overlap = Overlap.of(found, wanted)
    assert overlap.iou_of_images()[0] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert overlap.accuracy_of_images()[0] == 0.5


def test_weights_count_an_image_more_than_once() -> None:
    found, wanted = labels(0), labels(1)
    twice = Overlap.of(found[[0, 0, 2]], wanted[[0, 0, 2]]).iou_of_classes()
    both = Overlap.of(found, wanted).iou_of_classes(np.array([[2, 0, 1], [1, 1, 1]]))
    np.testing.assert_allclose(both[0], twice)
    np.testing.assert_allclose(both[1], Overlap.of(found, wanted).iou_of_classes())


def test_a_face_is_in_order() -> None:
    face = np.zeros((32, 32), np.uint8)
    face[6:30, 6:26] = 1
    for rows, number in (((10, 12), 4), ((16, 18), 2), ((22, 24), 11)):
        face[slice(*rows), 12:18] = number
    assert face_like(face)
    assert not face_like(face[::-1])
    assert not face_like(np.where(face == 2, 1, face).astype(np.uint8))


def test_psnr_is_torchmetrics() -> None:
    a, b = pictures(0), pictures(1)
    for one, other, value in zip(a, b, drift.psnr(a, b), strict=True):
        want = peak_signal_noise_ratio(
            torch.from_numpy(one).double(), torch.from_numpy(other).double(), data_range=255.0
        )
        assert value == pytest.approx(float(want), rel=1e-6)
    np.testing.assert_allclose(drift.psnr(a, a), 120)
    region = np.zeros((32, 32), bool)
    region[:, :16] = True
    assert drift.psnr_outside(a[0], b[0], region) == pytest.approx(drift.psnr(a[:1, :, 16:], b[:1, :, 16:])[0])


def test_ssim_is_one_of_equal_pictures_and_falls_with_noise() -> None:
    smooth = np.broadcast_to(np.linspace(0, 255, 32).astype(np.uint8)[None, :, None, None], (2, 32, 32, 3))
    noisy = (
        (smooth.astype(int) + np.random.default_rng(0).integers(-40, 41, smooth.shape)).clip(0, 255).astype(np.uint8)
    )
    np.testing.assert_allclose(drift.ssim(smooth, smooth), 1)
    assert (drift.ssim(smooth, noisy) < 0.9).all()


def test_latents_and_colours_drift_by_what_was_added() -> None:
    exact = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    assert drift.latents_error(exact * 1.1, exact) == pytest.approx(0.1, rel=1e-5)
    a = np.full((1, 16, 16, 3), 100, np.uint8)
    b, mask = a.copy(), np.zeros((1, 16, 16), np.uint8)
    mask[:, :8] = 13
    b[:, :8, :, 1] += 7
    assert drift.colour_shift(a, b, mask) == 7
    mask[:] = 0
    mask[:, 0, :3] = 13  # too few pixels to have a colour
    assert drift.colour_shift(a, b, mask) == pytest.approx(7 * 125 / 253)  # of 253 pixels of background
    assert drift.rms_difference(a, b) == pytest.approx((49 / 6) ** 0.5)


def test_pictures_are_resized_without_aliasing_or_rounding() -> None:
    """Stripes of one pixel become grey, not stripes of another width; and a slope keeps its fractions."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = resized(stripes, 16, 16)
    assert small.dtype == np.float32
    assert abs(small[:, 2:-2] - 127.5).max() < 3
    slope = np.broadcast_to(np.arange(8, dtype=np.uint8)[None, :, None], (8, 8, 3))
    large = resized(np.ascontiguousarray(slope), 8, 32)
    assert (large % 1 != 0).any()
    assert np.array_equal(resized(stripes, 64, 64), stripes)
    assert to_tensor([stripes]).shape == (1, 3, 64, 64)
    assert set(to_tensor([stripes]).unique().tolist()) == {-1, 1}


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"a\.png"):
        read_picture(tmp_path / "a.png")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "grey.png")
    assert read_picture(tmp_path / "grey.png").shape == (4, 4, 3)
