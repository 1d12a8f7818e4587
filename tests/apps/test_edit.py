"""The command ``edit`` takes settings from the image, asks for what the image doesn't hold, and keeps all other pixels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mogle_rt import Pipeline, masks
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.errors import InputError
from mogle_rt.jobs.image_files import save_image
from mogle_rt.jobs.settings_read import ImageSettings, mask_text, read_settings
from tests.apps.test_cli import QUICK, draw_mask, one_thread, run

SIZE = (32, 48)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    with one_thread():
        yield


def hat_on(mask: Path, path: Path) -> Path:
    labels = masks.to_labels(mask).copy()
    labels[:6, :6] = 14
    masks.to_image(labels).save(path)
    return path


@pytest.fixture
def drawn(tiny_bundle: Path, tmp_path: Path) -> Path:
    """An image that ``generate`` drew from mask.png."""
    mask = draw_mask(tmp_path / "mask.png")
    image = tmp_path / "face.png"
    assert run("generate", tiny_bundle, "-m", mask, "-p", "a <man> & hat", "-o", image, "--seed", "7", *QUICK).code == 0
    return image


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.quick
def test_settings_and_the_old_mask_come_from_the_image(drawn: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    new, sheet = hat_on(tmp_path / "mask.png", tmp_path / "new.png"), tmp_path / "sheet.png"
    result = run("edit", drawn, "--mask", new, "-c", tiny_bundle, "--sheet", sheet, "--device", "cpu")
    target = tmp_path / "face_edited.png"
    assert (result.code, result.out) == (0, f"{target}\n{sheet}\n")
    assert re.fullmatch(r"1 image in \S+ s \(seed 7\): load \S+ s, .*decode \S+ s", result.err.splitlines()[-1])
    before, after = pixels(drawn), pixels(target)
    assert (before[:6, :6] != after[:6, :6]).any(-1).mean() > 0.9
    assert (before[14:] == after[14:]).all()
    assert (before[:, 14:] == after[:, 14:]).all()
    expected = Pipeline(tiny_bundle, device="cpu").edit(
        drawn, tmp_path / "mask.png", new, "a <man> & hat", seed=7, num_inference_steps=2
    )
    assert (np.asarray(expected.images[0]) == after).all()
    read = read_settings(target)
    assert (read.prompt, read.seed, read.steps, read.mask) == ("a <man> & hat", 7, 2, "new.png")
    assert read.labels is not None
    assert (read.labels == masks.to_labels(new)).all()
    parts = pixels(sheet)
    assert (parts[6 : 6 + 32, 6 + 54 : 6 + 54 + 48] == before).all()
    assert (parts[6 : 6 + 32, 6 + 3 * 54 : 6 + 3 * 54 + 48] == after).all()


def test_an_edit_can_be_edited_by_classes(drawn: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """The command's options come before the settings that stand in the image."""
    new = hat_on(tmp_path / "mask.png", tmp_path / "new.png")
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    assert run("edit", drawn, "-m", new, "-c", tiny_bundle, "-o", first).code == 0
    options = ("--regions", "hat", "--margin", "8", "-p", "a hat", "--seed", "9", "--steps", "3")
    assert run("edit", first, "-c", tiny_bundle, "-o", second, *options).code == 0
    read = read_settings(second)
    assert (read.prompt, read.seed, read.steps) == ("a hat", 9, 3)
    assert (pixels(first)[15:] == pixels(second)[15:]).all()
    assert (pixels(first)[:6, :6] != pixels(second)[:6, :6]).any()


@pytest.mark.quick
def test_what_is_missing_is_asked_for(tiny_bundle: Path, tmp_path: Path) -> None:
    mask = draw_mask(tmp_path / "mask.png")
    plain, named = tmp_path / "photo.png", tmp_path / "named.png"
    Image.new("RGB", (48, 32), "grey").save(plain)
    save_image(
        Image.new("RGB", (48, 32)), named, {"mask": "old.png", "software": "mogle_rt", "bundle_sha256": "0" * 64}
    )
    for arguments, message in (
        ((plain, "-m", mask), "photo.png: holds no mask; give the mask that belongs to it with --mask-before"),
        ((named, "-m", mask), "holds no mask (it was drawn from a mask called 'old.png'); give the mask"),
        ((plain, "--mask-before", mask), "give the mask of the result with --mask, or classes to draw anew"),
        (
            (plain, "--mask-before", mask, "-m", mask),
            "does not say which bundle drew it; name the bundle with --checkpoint",
        ),
        ((named, "--mask-before", mask, "-m", mask), "was drawn by another bundle than the demo; name the bundle"),
        ((tmp_path / "no.png", "-m", mask), "no.png: no such file"),
        ((mask.with_name("text"), "-m", mask), "can't be read as an image"),
        ((plain, "--mask-before", mask, "-m", tmp_path / "no.png"), "no.png: no such file"),
        ((plain, "--mask-before", mask, "-m", mask, "-o", plain), "photo.png: exists already"),
        ((plain, "--mask-before", mask, "-m", mask, "-o", "a.gif"), "images are written as .png"),
        ((plain, "--mask-before", mask, "-m", mask, "--steps", "0"), "num_inference_steps must be a positive integer"),
        ((plain, "--mask-before", mask, "-m", mask, "-c", tiny_bundle, "--strength", "2"), "strength must be a number"),
    ):
        mask.with_name("text").write_text("hello")
        before = sorted(tmp_path.iterdir())
        result = run("edit", *arguments)
        assert result.code == 1
        assert message in result.err
        assert result.err.startswith("error: ")
        assert result.err.count("\n") == 1
        assert sorted(tmp_path.iterdir()) == before


BAD: list[tuple[dict[str, Any], str]] = [
    ({"seed": "seven"}, "seed must be a whole number"),
    ({"seed": -1}, "seed must be from 0"),
    ({"steps": 10**9}, "steps must be from 1 to 10000"),
    ({"guidance_scale": "NaN"}, "guidance_scale must be"),
    ({"prompt": ["a"]}, "prompt must be a text"),
    ({"model_config": {"union_cond_attn": 3}}, "must be true or false"),
    ({"bundle_sha256": "xyz"}, "must be a SHA-256"),
]


@pytest.mark.quick
@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda v: str(v)[:30])
def test_what_an_image_says_is_checked(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        save_image(Image.new("RGB", (16, 16)), tmp_path / name, {"software": "mogle_rt"} | change)
        with pytest.raises(InputError, match=message):
            read_settings(tmp_path / name)


@pytest.mark.quick
@pytest.mark.parametrize("text", ["no base 64!", "aGVsbG8=", ""])
def test_a_mask_within_an_image_is_checked(text: str) -> None:
    with pytest.raises(InputError, match="the mask within the image can't be read"):
        _ = ImageSettings(mask_png=text).labels


@pytest.mark.quick
def test_other_images_have_no_settings(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "plain.png")
    save_image(Image.new("RGB", (16, 16)), tmp_path / "mark.png")
    save_image(Image.new("RGB", (16, 16)), tmp_path / "other.jpg", {"title": "of another program"})
    for name in ("plain.png", "mark.png", "other.jpg"):
        assert read_settings(tmp_path / name) == ImageSettings()


def test_a_jpeg_without_room_for_the_mask_leaves_it_out(tmp_path: Path) -> None:
    settings = {"software": "mogle_rt", "prompt": "x" * 60_000, "mask_png": "A" * 20_000}
    save_image(Image.new("RGB", (16, 16)), tmp_path / "a.jpg", settings)
    assert read_settings(tmp_path / "a.jpg").mask_png is None
    save_image(Image.new("RGB", (16, 16)), tmp_path / "a.png", settings)
    assert read_settings(tmp_path / "a.png").mask_png == settings["mask_png"]
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        assert "mask_png" not in image.text  # type: ignore[attr-defined]  # once, within the packet


def test_a_mask_too_complex_to_be_written_is_left_out() -> None:
    noise = np.random.default_rng(0).integers(0, 19, (512, 512), dtype=np.uint8)
    assert mask_text(noise) is None
    smooth = np.zeros((512, 512), dtype=np.uint8)
    smooth[100:400, 100:400] = 1
    text = mask_text(smooth)
    assert text is not None
    assert np.array_equal(np.asarray(ImageSettings(mask_png=text).labels), smooth)


def test_the_demo_s_own_images_need_no_checkpoint(tmp_path: Path) -> None:
    mask = draw_mask(tmp_path / "mask.png")
    text, content = mask_text(masks.to_labels(mask)), Bundle("demo").content_hash
    settings = {"software": "mogle_rt", "bundle_sha256": content, "mask_png": text}
    save_image(Image.new("RGB", (48, 32), "grey"), tmp_path / "a.png", settings)
    result = run("edit", tmp_path / "a.png", "--regions", "background", "--steps", "1", "-o", tmp_path / "b.png")
    assert result.code == 0
    assert (tmp_path / "b.png").exists()
