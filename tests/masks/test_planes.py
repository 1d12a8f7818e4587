"""Planes of classes are merged into labels, later ones over earlier ones; where several masks are expected, they are
refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mogle_rt import masks
from mogle_rt.errors import MaskError
from mogle_rt.masks import CLASS_NAMES, Labels
from tests.masks.test_masks import draw_face
from tests.masks.test_orders import PARSERS, renumbered

SHORT = {"eye_glasses": "eye_g", "ear_ring": "ear_r", "necklace": "neck_l"}
LABELS = draw_face(64)


def overlapping(labels: Labels) -> np.ndarray:
    """Planes [19, H, W] in which skin also lies under all later parts, as in CelebAMask-HQ's annotations."""
    planes = labels == np.arange(19)[:, None, None]
    planes[1] |= labels > 1
    return planes


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
@pytest.mark.parametrize("most", [1, 255])
def test_later_parts_lie_over_earlier_ones(dtype: type, most: int) -> None:
    if dtype is bool and most == 255:
        return
    planes = overlapping(LABELS).astype(dtype) * dtype(most)
    whole = np.concatenate([np.ones_like(planes[:1]) * dtype(most), planes])
    for given in (planes, planes[1:], whole, planes[None], torch.from_numpy(planes)):
        np.testing.assert_array_equal(masks.from_planes(given), LABELS)


@pytest.mark.parametrize("order", PARSERS)
def test_planes_in_another_order(order: str) -> None:
    place = np.array([renumbered(np.array([[c]], dtype=np.uint8), order)[0, 0] for c in range(19)])
    planes = overlapping(LABELS)[np.argsort(place)]
    np.testing.assert_array_equal(masks.from_planes(planes, order=order), LABELS)
    np.testing.assert_array_equal(masks.from_planes(planes[1:], order=order), LABELS)


def test_planes_by_name() -> None:
    planes = {SHORT.get(name, name): overlapping(LABELS)[c] for c, name in enumerate(CLASS_NAMES) if c}
    np.testing.assert_array_equal(masks.from_planes(planes), LABELS)
    with pytest.raises(MaskError, match="'chin' is not a class"):
        masks.from_planes({"chin": LABELS > 0})


def test_scores_by_argmax() -> None:
    logits = np.random.default_rng(0).normal(size=(19, 20, 24)).astype(np.float32)
    np.testing.assert_array_equal(masks.from_planes(logits, scores=True), logits.argmax(0))
    np.testing.assert_array_equal(masks.from_planes(torch.from_numpy(logits), scores=True), logits.argmax(0))
    with pytest.raises(MaskError, match="pass scores=True"):
        masks.from_planes(logits)
    with pytest.raises(MaskError, match="a plane for each of 19 classes, including the background; got 18"):
        masks.from_planes(logits[1:], scores=True)
    with pytest.raises(MaskError, match="none of them NaN"):
        masks.from_planes(logits * np.nan, scores=True)


@pytest.mark.parametrize("count", [18, 19, 20])
@pytest.mark.parametrize("kind", ["uint8", "255", "bool", "float", "last"])
def test_planes_are_no_batch(kind: str, count: int) -> None:
    planes = np.concatenate([overlapping(LABELS), np.ones((1, 64, 64), dtype=bool)])[-count:]
    given = {
        "uint8": planes.astype(np.uint8),
        "255": planes.astype(np.uint8) * np.uint8(255),
        "bool": planes,
        "float": planes.astype(np.float32),
        "last": planes.transpose(1, 2, 0).astype(np.uint8),
    }[kind]
    for mask in (given, torch.from_numpy(np.ascontiguousarray(given))):
        with pytest.raises(MaskError, match=r"seems to hold planes of classes.*from_planes\(planes\)"):
            masks.to_label_batch(mask, height=64, width=64)
        with pytest.raises(MaskError, match=r"from_planes\(planes\)"):
            masks.to_labels(mask)


def write_parts(folder: Path, face: str, labels: Labels) -> None:
    folder.mkdir(exist_ok=True)
    for c in range(1, 19):
        name = SHORT.get(CLASS_NAMES[c], CLASS_NAMES[c])
        Image.fromarray(overlapping(labels)[c].astype(np.uint8) * 255).save(folder / f"{face}_{name}.png")


def test_a_folder_of_part_files(tmp_path: Path) -> None:
    write_parts(tmp_path / "parts", "00000", LABELS)
    (tmp_path / "parts" / "notes.txt").write_text("not a part")
    np.testing.assert_array_equal(masks.to_labels(tmp_path / "parts"), LABELS)
    write_parts(tmp_path / "parts", "00001", LABELS)
    with pytest.raises(MaskError, match=r"parts: holds parts of 2 faces \(00000, 00001\); give each face a folder"):
        masks.to_labels(tmp_path / "parts")


def test_parts_of_two_sizes(tmp_path: Path) -> None:
    write_parts(tmp_path, "7", LABELS)
    Image.new("L", (30, 20)).save(tmp_path / "7_hat.png")
    with pytest.raises(MaskError, match=r"7_hat\.png: is 30 x 20 pixels; the other parts are 64 x 64"):
        masks.to_labels(tmp_path)
