"""What the repository ships for `make demo` is whole and works."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from examples.mask import face
from mogle_rt import Pipeline
from mogle_rt.checkpoint import Bundle
from mogle_rt.masks import to_labels

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_demo_bundle_is_what_its_hash_says() -> None:
    Bundle(EXAMPLES / "tiny.safetensors").verify()


def test_the_mask_is_what_its_script_draws() -> None:
    assert np.array_equal(to_labels(EXAMPLES / "mask.png"), face())


def test_mask_and_prompt_give_an_image() -> None:
    pipe = Pipeline(EXAMPLES / "tiny.safetensors", device="cpu", dtype="fp32")
    images = pipe(EXAMPLES / "mask.png", "a young woman", 2, height=64, width=64, output_type="np").images
    assert np.std(np.asarray(images)) > 0.01
