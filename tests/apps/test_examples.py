"""The repository's examples: its script draws the mask that is there, and `make demo` draws its picture."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import examples.demo
from examples.mask import face
from mogle_rt.bundle import shipped as demo
from mogle_rt.masks import to_labels

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_mask_is_what_its_script_draws() -> None:
    assert np.array_equal(to_labels(EXAMPLES / "mask.png"), face())


def test_make_demo_draws_every_example_and_the_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = [e for e in demo.examples() if e.name in ("hat", examples.demo.EDITED)]
    monkeypatch.setattr(examples.demo, "examples", lambda: two)
    monkeypatch.setattr(sys, "argv", ["demo.py", str(tmp_path / "demo" / "grid.png")])
    examples.demo.main()
    picture = np.asarray(Image.open(tmp_path / "demo" / "grid.png"))
    tile = examples.demo.TILE
    assert picture.shape[1] == 3 * (tile + examples.demo.GAP) - examples.demo.GAP  # two examples and the edit
    for column in range(3):
        left = column * (tile + examples.demo.GAP)
        image = picture[tile + examples.demo.GAP : 2 * tile + examples.demo.GAP, left : left + tile]
        assert image.std() > 20
