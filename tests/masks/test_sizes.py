"""Where no size is given, an image gets the shape of its mask, and about as many pixels as the model was made for."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from mogle_rt import Pipeline
from mogle_rt.jobs.plan import Drawing, batches
from mogle_rt.masks import Labels, to_image
from mogle_rt.masks.sizes import default_size, warn_of_distortion, warn_of_other_size
from tests.apps.test_cli import run as run_command
from tests.masks.test_orders import FACES, renumbered


def empty(height: int, width: int) -> Labels:
    return np.zeros((height, width), dtype=np.uint8)


@pytest.mark.parametrize(
    ("mask", "side", "size"),
    [
        ((512, 512), 512, (512, 512)),
        ((1024, 1024), 512, (512, 512)),
        ((7, 7), 128, (128, 128)),
        ((512, 384), 512, (592, 448)),
        ((384, 512), 512, (448, 592)),
        ((1080, 1920), 512, (384, 688)),
        ((1, 5000), 64, (16, 256)),
    ],
)
def test_the_mask_s_shape_at_the_model_s_area(mask: tuple[int, int], side: int, size: tuple[int, int]) -> None:
    assert default_size([empty(*mask)], side) == size


def test_masks_of_several_shapes_take_the_square() -> None:
    assert default_size([empty(512, 384), empty(1024, 768)], 512) == (592, 448)
    assert default_size([empty(512, 384), empty(512, 512)], 512) == (512, 512)


def test_distortion_gives_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_distortion([empty(512, 384)], 592, 448)
        warn_of_distortion([empty(100, 100)], 512, 528)
        warn_of_distortion([empty(128, 64)], 176, 96)  # no other allowed size is nearer to the mask's shape
    with pytest.warns(
        UserWarning, match=r"mask 1 is 384 x 512 pixels, .* stretched to 512 x 512; 448 x 592 would keep"
    ):
        warn_of_distortion([empty(8, 8), empty(512, 384)], 512, 512)


def test_batches_hold_one_shape() -> None:
    a, b = Path("a"), Path("b")
    drawings = [Drawing(mask, "", i, Path(str(i))) for i, mask in enumerate([a, a, a, b, b, None])]
    shapes: dict[Path | None, tuple[int, ...] | None] = {a: (4, 4), b: (4, 6), None: None}
    parts = batches(drawings, 2, lambda drawing: shapes[drawing.mask])
    assert [[drawing.seed for drawing in part] for part in parts] == [[0, 1], [2], [3, 4], [5]]


def test_the_pipeline_draws_the_mask_s_shape() -> None:
    pipe = Pipeline("demo", device="cpu", dtype="fp32")
    pipe.set_progress_bar_config(disable=True)
    portrait = FACES[0][:, : FACES[0].shape[1] // 2]
    for mask, shape in ((portrait, (176, 96)), ([portrait, FACES[0]], (128, 128))):
        images = pipe(mask, "", 1, output_type="pt").images
        assert isinstance(images, torch.Tensor)
        assert images.shape[2:] == shape
    with pytest.warns(UserWarning, match="is stretched to 128 x 128"):
        pipe(portrait, "", 1, height=128, width=128, output_type="pt")


def test_an_order_reaches_the_pipeline(tmp_path: Path) -> None:
    pipe = Pipeline("demo", device="cpu", dtype="fp32")
    pipe.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(0).normal(size=(1, 64, 64)).astype(np.float32)
    noise = torch.from_numpy(latents)
    own = pipe(FACES[0], "", 1, latents=noise, output_type="np").images
    other = pipe(renumbered(FACES[0], "farl"), "", 1, latents=noise, output_type="np", mask_order="farl").images
    np.testing.assert_array_equal(own, other)

    to_image(FACES[0]).save(tmp_path / "own.png")
    to_image(renumbered(FACES[0], "farl")).save(tmp_path / "farl.png")
    images = []
    for name, options in (("own", ()), ("farl", ("--mask-order", "farl"))):
        output = tmp_path / name
        arguments = ("-m", tmp_path / f"{name}.png", "-p", "a face", "-o", output, "--seed", "0", "--steps", "1")
        result = run_command(
            "generate", "demo", *arguments, "--device", "cpu", "--dtype", "fp32", "--no-metadata", *options
        )
        assert result.code == 0, result.err
        images.append((output / f"{name}_0.png").read_bytes())
    assert images[0] == images[1]


@pytest.mark.parametrize(
    ("height", "width", "side", "told"),
    [
        (512, 512, 128, True),
        (64, 64, 128, True),
        (128, 128, 128, False),
        (160, 96, 128, False),
        (1024, 1024, 512, False),  # a model for 512 x 512 can draw larger images
    ],
)
def test_sizes_that_a_small_model_was_not_made_for(height: int, width: int, side: int, told: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_other_size(height, width, side)
    assert len(caught) == told
    if told:
        assert f"made for images of 128 x 128 pixels; at {width} x {height}" in str(caught[0].message)


def test_the_call_warns_of_size_and_guidance_once_each() -> None:
    pipe = Pipeline("demo", device="cpu", dtype="fp32")
    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe(None, "", 1, 7.0, height=64, width=64, output_type="latent")
    texts = [str(one.message) for one in caught]
    assert sum("made for images of 128 x 128" in text for text in texts) == 1
    assert sum("guidance_scale 7 has no effect" in text for text in texts) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(None, "", 1, height=128, width=128, output_type="latent")  # the default guidance gives no warning
