"""Class numbers in the orders of face parsers give the same labels, and a mask in another order gets a warning."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mogle_rt import masks
from mogle_rt.bundle.shipped import examples
from mogle_rt.errors import MaskError
from mogle_rt.masks import CLASS_NAMES, Labels
from tests.masks.test_masks import draw_face, random_labels

# Copied from the parsers' own lists, in CelebAMask-HQ's short names.
PARSERS = {
    "bisenet": "background skin l_brow r_brow l_eye r_eye eye_g l_ear r_ear ear_r nose mouth u_lip l_lip neck neck_l "
    "cloth hair hat",
    "farl": "background neck skin cloth l_ear r_ear l_brow r_brow l_eye r_eye nose mouth l_lip u_lip hair eye_g hat ear_r "
    "neck_l",
}
BISENET_COLOURS = [
    *((255, 255, 255), (255, 85, 0), (255, 170, 0), (255, 0, 85), (255, 0, 170), (0, 255, 0), (85, 255, 0)),
    *((170, 255, 0), (0, 255, 85), (0, 255, 170), (0, 0, 255), (85, 0, 255), (170, 0, 255), (0, 85, 255)),
    *((0, 170, 255), (255, 255, 0), (255, 255, 85), (255, 255, 170), (255, 0, 255)),
]
LONG = {"eye_g": "eye_glasses", "ear_r": "ear_ring", "neck_l": "necklace"}
FACES = [masks.to_labels(example.mask) for example in examples()]


def renumbered(labels: Labels, order: str) -> Labels:
    """The labels in the parser's numbers."""
    names = [LONG.get(name, name) for name in PARSERS[order].split()]
    return np.array([names.index(name) for name in CLASS_NAMES], dtype=np.uint8)[labels]


@pytest.mark.quick
@pytest.mark.parametrize("order", PARSERS)
def test_orders_of_parsers(order: str, tmp_path: Path) -> None:
    for labels in (random_labels(0), draw_face(64)):
        given = renumbered(labels, order)
        Image.fromarray(given).save(tmp_path / "mask.png")
        np.save(tmp_path / "mask.npy", given)
        for named in (order, PARSERS[order].split()):
            for mask in (given, given.astype(np.int64), tmp_path / "mask.png", tmp_path / "mask.npy"):
                np.testing.assert_array_equal(masks.to_labels(mask, order=named), labels)
            for one in masks.to_label_batch([given, masks.to_image(given)], order=named):
                np.testing.assert_array_equal(one, labels)


def test_a_shorter_list_of_names() -> None:
    numbers = np.array([[0, 1, 2]], dtype=np.uint8)
    got = masks.to_labels(numbers, order=["background", "hair", "skin"])
    np.testing.assert_array_equal(got, [[0, 13, 1]])
    with pytest.raises(MaskError, match=r"holds 2, .* classes are 0 \(background\) to 1 \(hair\)"):
        masks.to_labels(numbers, order=["background", "hair"])


@pytest.mark.parametrize("order", ["celeba", ["background", "face"], [], 3])
def test_unknown_orders(order: object) -> None:
    with pytest.raises(
        MaskError, match=r"celebamask, bisenet, farl|'face' is not a class; classes are background, skin"
    ):
        masks.to_labels(np.zeros((4, 4), dtype=np.uint8), order=order)  # type: ignore[arg-type]


def test_colours_name_classes_in_every_order() -> None:
    labels = draw_face(64)
    for order in ("celebamask", *PARSERS):
        np.testing.assert_array_equal(masks.to_labels(masks.colorize(labels), order=order), labels)


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0)])
def test_bisenet_s_own_colours(background: tuple[int, int, int]) -> None:
    labels = draw_face(128)
    colours = np.array([background, *BISENET_COLOURS[1:]], dtype=np.uint8)
    picture = Image.fromarray(colours[renumbered(labels, "bisenet")])
    np.testing.assert_array_equal(masks.to_labels(picture), labels)
    renumbered_palette = picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=32)
    np.testing.assert_array_equal(masks.to_labels(renumbered_palette), labels)


@pytest.mark.quick
@pytest.mark.parametrize("order", PARSERS)
def test_another_order_gives_a_warning(order: str) -> None:
    for labels in FACES:
        with pytest.warns(UserWarning, match=f"in the order '{order}' .* are: pass order='{order}'") as caught:
            masks.to_labels(renumbered(labels, order))
        assert len(caught) == 1


def test_a_mask_in_its_own_order_gives_no_warning() -> None:
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for labels in FACES:
            height, width = labels.shape
            for _ in range(20):
                y, x = rng.integers(0, height - 40), rng.integers(0, width - 40)
                part = labels[y : rng.integers(y + 40, height + 1), x : rng.integers(x + 40, width + 1)]
                for mask in (part, part[:, ::-1], part[::-1]):
                    masks.to_labels(mask)
            for order in PARSERS:
                masks.to_labels(renumbered(labels, order), order=order)


def test_a_few_parts_give_no_warning() -> None:
    """Bands of five classes, one above the other, give no warning: they say too little about the order."""
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(50):
            bands = rng.choice(len(CLASS_NAMES), 5, replace=False).astype(np.uint8)
            masks.to_labels(bands.repeat(16)[:, None].repeat(64, axis=1))
