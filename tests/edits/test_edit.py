"""Edits: pixels outside the region stay exactly, a batch draws what single edits draw, and the ends of each option's
range do what they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mogle_rt import InputError, Pipeline
from mogle_rt.calls.results import OutputType
from mogle_rt.edits.regions import changed_region, latent_weights, pixel_weights
from mogle_rt.edits.start import StartImage
from mogle_rt.encoders.vae import unpack_latents
from mogle_rt.loop.blend import Blend
from mogle_rt.masks import Labels
from tests.conftest import assert_close, relative_rms

SIZE, STEPS, MARGIN = 64, 3, 8


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Pipeline:
    return Pipeline(tiny_bundle, device="cpu", dtype="fp32")


def face(seed: int) -> Labels:
    """A mask of rectangles, which depend on the seed."""
    random = np.random.default_rng(seed)
    labels = np.zeros((SIZE, SIZE), dtype=np.uint8)
    for c in (1, 2, 13):
        y, x = random.integers(0, SIZE // 2, 2)
        labels[y : y + SIZE // 3, x : x + SIZE // 3] = c
    return labels


def with_hat(labels: Labels, column: int = 40) -> Labels:
    """The mask with a hat of 10 x 6 pixels."""
    changed = labels.copy()
    changed[2:12, column : column + 6] = 14
    return changed


def weights_of(before: Labels, after: Labels) -> Tensor:
    return pixel_weights(changed_region(before, after, []), MARGIN, MARGIN // 2)


def draw(pipe: Pipeline, seed: int, output_type: OutputType = "pt") -> Any:
    return pipe(face(seed), "a man", STEPS, height=SIZE, width=SIZE, seed=seed, output_type=output_type).images


def edit(pipe: Pipeline, image: Any, before: Any, after: Any, prompt: Any = "a hat", **options: Any) -> Tensor:
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "seed": 5, "output_type": "pt", "margin": MARGIN}
    images = pipe.edit(image, before, after, prompt, **settings | options).images
    assert isinstance(images, Tensor)
    return images


@pytest.mark.quick
@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_pixels_outside_stay_exactly(pipe: Pipeline, kind: OutputType, strength: float) -> None:
    before, after = face(1), with_hat(face(1))
    image = draw(pipe, 1, kind)
    edited = pipe.edit(
        image, before, after, "a hat", strength, num_inference_steps=STEPS, seed=5, output_type=kind, margin=MARGIN
    ).images
    a, b = (np.asarray(images[0]) for images in (image, edited))
    outside = weights_of(before, after)[0].numpy() == 0
    if kind == "pt":
        a, b = (np.moveaxis(x, 0, -1) for x in (a, b))
    assert a.dtype == b.dtype
    assert outside.mean() > 0.5
    assert (a[outside] == b[outside]).all()
    assert (a[2:12, 40:46] != b[2:12, 40:46]).any(-1).mean() > 0.9


def kept_latents(pipe: Pipeline) -> tuple[Tensor, Tensor]:
    """The latents where an edit keeps everything: those after the edit, and the image's own."""
    before, after, image = face(1), with_hat(face(1)), draw(pipe, 1)
    packed = edit(pipe, image, before, after, output_type="latent")
    own = pipe.conditioner.image_latents(image)
    outside = latent_weights(weights_of(before, after)[None])[0, 0] == 0
    assert outside.float().mean() > 0.5
    ends, starts = (unpack_latents(x, SIZE, SIZE)[0][:, outside] for x in (packed, own))
    return ends, starts


@pytest.mark.quick
def test_latents_outside_end_as_the_image_s(pipe: Pipeline) -> None:
    assert torch.equal(*kept_latents(pipe))


def test_a_blend_that_is_left_out_is_seen(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Blend, "__call__", lambda *_: None)
    ends, starts = kept_latents(pipe)
    assert relative_rms(ends, starts) > 0.01


def test_every_step_is_blended(pipe: Pipeline) -> None:
    """After each step, the latents outside the region are the image's with noise of this step's level."""
    before, after, image = face(1), with_hat(face(1)), draw(pipe, 1)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(1, (SIZE // 16) ** 2, 64, generator=generator)
    own = pipe.conditioner.image_latents(image)
    outside = latent_weights(weights_of(before, after)[None])[0, 0] == 0
    levels: list[float] = []

    def look(_: Pipeline, k: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
        following = torch.tensor(TIMESTEPS[k + 1]) / 1000
        expected = (1 - following) * own + following * noise
        found, wanted = (unpack_latents(x, SIZE, SIZE)[0][:, outside] for x in (tensors["latents"], expected))
        assert_close(found, wanted, rms=1e-6)
        assert float(timestep) == TIMESTEPS[k]
        levels.append(float(following))

    TIMESTEPS: list[float] = []
    pipe(
        face(1), "", STEPS, height=SIZE, width=SIZE, callback_on_step_end=lambda p, k, t, c: TIMESTEPS.append(float(t))
    )
    TIMESTEPS.append(0.0)
    edit(pipe, image, before, after, seed=None, latents=noise, callback_on_step_end=look)
    assert len(levels) == STEPS


@pytest.mark.quick
def test_where_nothing_changes_the_image_comes_back(pipe: Pipeline) -> None:
    image = draw(pipe, 1)
    with pytest.warns(UserWarning, match="nothing is drawn anew, because the two masks are equal"):
        assert torch.equal(edit(pipe, image, face(1), face(1)), image)
    assert pipe.last_run.steps == 0
    with pytest.warns(UserWarning, match="because no pixel is of eye_glasses"):
        assert torch.equal(edit(pipe, image, face(1), face(1), regions="eye_glasses"), image)
    both = edit(pipe, image, face(1), [face(1), with_hat(face(1))])  # in a batch, beside an image that does change
    assert torch.equal(both[:1], image)
    assert not torch.equal(both[1:], image)


@pytest.mark.quick
def test_an_area_is_drawn_anew_as_a_change_of_the_mask_is(pipe: Pipeline) -> None:
    """The same pixels by an area of the image, without a change of the mask; each image of a batch has its own."""
    image, labels, area = draw(pipe, 1), face(1), np.zeros((SIZE, SIZE), np.uint8)
    area[2:12, 40:46] = 1
    alone = edit(pipe, image, labels, labels, area=area)
    outside = pixel_weights(area.astype(bool), MARGIN, MARGIN // 2) == 0
    assert torch.equal(alone[0][:, outside[0]], image[0][:, outside[0]])
    assert (alone != image)[0, :, 2:12, 40:46].any(0).float().mean() > 0.9
    both = edit(
        pipe, torch.cat([image, image]), labels, labels, area=[np.zeros_like(area), torch.from_numpy(area)], seed=[5, 5]
    )
    assert torch.equal(both[:1], image)
    assert_close(both[1:], alone, rms=1e-5)
    with pytest.warns(UserWarning, match="the two masks are equal and no pixel is in the area"):
        assert torch.equal(edit(pipe, image, labels, labels, area=np.zeros_like(area)), image)
    with pytest.raises(InputError, match=r"of the image's size, \[64, 64\], .* got uint8 of shape \[32, 64\]"):
        edit(pipe, image, labels, labels, area=area[:32])
    with pytest.raises(InputError, match="got 3 for 1 images"):
        edit(pipe, image, labels, labels, area=[area] * 3)


@pytest.mark.quick
def test_batch_equals_single_edits(pipe: Pipeline) -> None:
    images = torch.cat([draw(pipe, seed) for seed in (1, 2, 3)])
    before = [face(seed) for seed in (1, 2, 3)]
    after = [with_hat(labels, column) for labels, column in zip(before, (5, 25, 45), strict=True)]
    prompts = ["a hat", "a green hat", ""]
    together = edit(pipe, images, before, after, prompts, seed=[7, 8, 9], strength=0.8)
    for i in range(3):
        alone = edit(pipe, images[i], before[i], after[i], prompts[i], seed=7 + i, strength=0.8)
        assert_close(together[i : i + 1], alone, rms=1e-5)
        outside = weights_of(before[i], after[i])[0] == 0
        assert torch.equal(together[i][:, outside], images[i][:, outside])


def test_one_image_with_several_masks_prompts_and_images(pipe: Pipeline) -> None:
    image, before, after = draw(pipe, 1), face(1), [with_hat(face(1), 5), with_hat(face(1), 45)]
    together = edit(pipe, image, before, after, num_images_per_prompt=2, seed=20)
    assert len(together) == 4
    assert_close(together[3:], edit(pipe, image, before, after[1], seed=23), rms=1e-5)
    together = edit(pipe, image, before, after[0], ["a", "b"], seed=20)
    assert_close(together[1:], edit(pipe, image, before, after[0], "b", seed=21), rms=1e-5)


@pytest.mark.quick
def test_at_full_strength_nothing_is_left_of_the_image(pipe: Pipeline) -> None:
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "seed": 4, "output_type": "pt"}
    plain: Any = pipe(face(2), "a man", height=SIZE, width=SIZE, **settings).images
    image = draw(pipe, 1)
    full: Any = pipe.image_to_image(image, face(2), "a man", strength=1, **settings).images
    assert torch.equal(full, plain)
    weaker: Any = pipe.image_to_image(image, face(2), "a man", strength=0.4, **settings).images
    assert relative_rms(weaker, image) < relative_rms(plain, image)
    everywhere = edit(pipe, image, face(1), face(2), "a man", seed=4, regions="background", margin=SIZE, feather=0)
    assert torch.equal(everywhere, plain)  # the region of this edit is the whole image


def test_no_mask_is_all_background(pipe: Pipeline) -> None:
    image = draw(pipe, 1)
    options: dict[str, Any] = {"num_inference_steps": STEPS, "seed": 4, "output_type": "pt"}
    background = np.zeros((SIZE, SIZE), dtype=np.uint8)
    a, b = (pipe.image_to_image(image, mask, "a man", **options).images for mask in (background, None))
    assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    ("steps", "strength", "run"), [(10, 0.3, 3), (28, 0.6, 17), (5, 0.5, 3), (4, 1, 4), (3, 1 / 3, 1)]
)
def test_strength_chooses_the_steps_of_diffusers(pipe: Pipeline, steps: int, strength: float, run: int) -> None:
    counted: list[int] = []
    pipe.image_to_image(
        draw(pipe, 1),
        strength=strength,
        num_inference_steps=steps,
        output_type="latent",
        callback_on_step_end=lambda p, k, t, c: counted.append(k),
    )
    assert counted == list(range(run))
    assert pipe.num_timesteps == pipe.last_run.steps == run
    from diffusers import FluxImg2ImgPipeline

    theirs = object.__new__(FluxImg2ImgPipeline)
    object.__setattr__(theirs, "scheduler", type("S", (), {"timesteps": torch.arange(steps), "order": 1})())
    assert len(theirs.get_timesteps(steps, strength, "cpu")[0]) == run


@pytest.mark.quick
def test_named_regions_are_drawn_anew_and_kept_ones_stay(pipe: Pipeline) -> None:
    labels, image = face(1), draw(pipe, 1)
    options: dict[str, Any] = {"num_inference_steps": STEPS, "seed": 5, "output_type": "pt", "margin": MARGIN}
    painted = pipe.inpaint(image, labels, "red hair", regions=["hair"], **options).images[0]
    changed = (painted != image[0]).any(0).numpy()
    near = pixel_weights(labels == 13, MARGIN, MARGIN // 2)[0].numpy() > 0
    assert changed[labels == 13].mean() > 0.9
    assert not changed[~near].any()
    assert changed[(labels == 1) & near].any()
    held = pipe.inpaint(image, labels, "red hair", regions=["hair"], keep="skin", **options).images[0]
    assert not (held != image[0]).any(0).numpy()[labels == 1].any()


@pytest.mark.quick
def test_runs_without_an_edit_stay_the_same(pipe: Pipeline, tiny_bundle: Path) -> None:
    """Edits change no run before, between or after them, even in buffers that an edit of the same shape used."""
    expected = draw(Pipeline(tiny_bundle, device="cpu", dtype="fp32"), 3)
    pipe.engine._runners.limit = 1 << 30  # type: ignore[attr-defined]  # keep both steps, as on a GPU
    first = edit(pipe, expected, face(3), with_hat(face(3)))
    other = edit(pipe, draw(pipe, 1), face(1), with_hat(face(1), 10), seed=6)
    assert torch.equal(draw(pipe, 3), expected)
    assert torch.equal(edit(pipe, expected, face(3), with_hat(face(3))), first)
    fresh = Pipeline(tiny_bundle, device="cpu", dtype="fp32")
    assert torch.equal(edit(fresh, draw(fresh, 1), face(1), with_hat(face(1), 10), seed=6), other)
    pipe.engine._runners.limit = 0  # type: ignore[attr-defined]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"strength": 0}, "strength must be a number above 0 and at most 1, got 0"),
    ({"strength": 1.5}, "strength must be a number above 0 and at most 1, got 1.5"),
    ({"strength": float("nan")}, "strength must be"),
    ({"strength": 1e-20}, "strength 1e-20 of 3 steps leaves none to run: take a strength of 0.33 or more"),
    ({"height": 32}, "height can't be chosen here: the result has the image's size, 64 x 64"),
    ({"start": 1}, "start can't be chosen here"),
    ({"margin": -1}, "margin must be a whole number"),
    ({"regions": "hairs"}, "there is no class 'hairs'; did you mean 'hair'"),
    ({"before": [face(1)] * 2, "after": [face(1)] * 3}, "got 1 images, 2 masks before, 3 masks after"),
    ({"prompt": ["a", "b", "c"], "after": [with_hat(face(1))] * 2}, "2 masks and 3 prompts don't pair up"),
    ({"before": "a man with a hat"}, "reads like a prompt"),
    ({"nonsense": 1}, "unexpected keyword argument 'nonsense'"),
]


@pytest.mark.quick
@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_wrong_arguments_are_refused(pipe: Pipeline, options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"before": face(1), "after": with_hat(face(1))}
    with pytest.raises((InputError, TypeError), match=message):
        edit(pipe, torch.rand(1, 3, SIZE, SIZE), **given | options)


def test_inpainting_needs_a_region(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="inpaint needs the classes to draw anew"):
        pipe.inpaint(torch.rand(3, SIZE, SIZE), face(1), "red hair")


def test_a_start_of_another_shape_is_refused(pipe: Pipeline) -> None:
    start = StartImage(pixels=torch.rand(2, 3, SIZE, SIZE), strength=1.0)
    with pytest.raises(InputError, match=r"start has images of shape \[2, 3, 64, 64\], but this call draws \[1, 3"):
        pipe(face(1), "", STEPS, height=SIZE, width=SIZE, start=start)
