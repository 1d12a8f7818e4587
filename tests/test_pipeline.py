"""The public call: batches, seeds, callbacks, sizes, stages."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mogle_rt import CheckpointError, FastConfig, InputError, Pipeline
from mogle_rt.calls.results import OutputType
from mogle_rt.encoders.conditioning import Conditioner
from mogle_rt.encoders.mask_planes import MaskPlanes
from mogle_rt.encoders.vae import pack_latents, unpack_latents
from mogle_rt.engines.contract import Conditions
from mogle_rt.loop.schedule import Schedule
from mogle_rt.masks import Labels, resize
from tests.checkpoints import TINY, Files
from tests.conftest import assert_close, relative_rms

SIZE = 64


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Pipeline:
    return Pipeline(tiny_bundle, device="cpu", dtype="fp32")


def draw(seed: int, size: int = SIZE) -> Labels:
    """A mask of rectangles, other ones for other seeds."""
    random = np.random.default_rng(seed)
    labels = np.zeros((size, size), dtype=np.uint8)
    for c in random.permutation(np.arange(1, 19))[:8]:
        y, x = random.integers(0, size - 8, 2)
        labels[y : y + size // 3, x : x + size // 3] = c
    return labels


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(pipe: Pipeline, mask: Any, prompt: Any, **options: Any) -> Tensor:
    settings: dict[str, Any] = {"num_inference_steps": 3, "height": SIZE, "width": SIZE, "output_type": "pt"}
    images = pipe(mask, prompt, **settings | options).images
    assert isinstance(images, Tensor)
    return images


@pytest.mark.quick
def test_batch_equals_single_runs(pipe: Pipeline) -> None:
    masks, prompts = [draw(1), draw(2), draw(3)], ["a woman", "an old man with glasses", ""]
    together = run(pipe, masks, prompts, generator=[seeded(s) for s in range(3)])
    assert together.shape == (3, 3, SIZE, SIZE)
    for i in range(3):
        alone = run(pipe, masks[i], prompts[i], generator=seeded(i))
        assert_close(together[i : i + 1], alone, rms=1e-5)
    assert relative_rms(together[0], together[1]) > 1e-3


def test_one_mask_with_several_prompts_and_the_other_way(pipe: Pipeline) -> None:
    prompts = ["blond hair", "a hat"]
    together = run(pipe, draw(1), prompts, generator=[seeded(0), seeded(0)])
    assert_close(together[1:], run(pipe, draw(1), prompts[1], generator=seeded(0)), rms=1e-5)
    together = run(pipe, [draw(1), draw(2)], "a hat", generator=[seeded(0), seeded(0)])
    assert_close(together[:1], run(pipe, draw(1), "a hat", generator=seeded(0)), rms=1e-5)


def test_num_images_per_prompt(pipe: Pipeline) -> None:
    images = run(
        pipe, [draw(1), draw(2)], ["a", "b"], num_images_per_prompt=2, generator=[seeded(s) for s in (5, 6, 7, 8)]
    )
    assert_close(images[1:2], run(pipe, draw(1), "a", generator=seeded(6)), rms=1e-5)
    assert_close(images[2:3], run(pipe, draw(2), "b", generator=seeded(7)), rms=1e-5)


@pytest.mark.quick
def test_the_same_seed_gives_the_same_bytes(pipe: Pipeline) -> None:
    a, b = (run(pipe, draw(4), "a face", generator=seeded(9)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, run(pipe, draw(4), "a face", generator=seeded(10)))


@pytest.mark.quick
def test_region_planes_matter(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's released scripts blank them; the image must change if that happens here."""
    mask = draw(5)
    right = run(pipe, mask, "", generator=seeded(0))
    encode = Conditioner.__call__

    def blank(self: Conditioner, masks: Any, **options: Any) -> MaskPlanes:
        encoded = encode(self, masks, **options)
        absent = next(c for c in range(1, 19) if not (mask == c).any())
        return replace(encoded, index=encoded.index[:, [0] + [1 + absent] * 19])

    monkeypatch.setattr(Conditioner, "__call__", blank)
    assert relative_rms(run(pipe, mask, "", generator=seeded(0)), right) > 1e-4  # equal runs agree within 1e-5


def test_no_mask_is_all_background_and_no_prompt_the_empty_one(pipe: Pipeline) -> None:
    background = np.zeros((SIZE, SIZE), dtype=np.uint8)
    a = run(pipe, None, None, generator=seeded(0))
    assert torch.equal(a, run(pipe, background, "", generator=seeded(0)))
    assert relative_rms(a, run(pipe, draw(1), "", generator=seeded(0))) > 1e-3
    assert relative_rms(a, run(pipe, None, "a green hat", generator=seeded(0))) > 1e-3


def test_masks_are_resized_by_nearest_neighbour(pipe: Pipeline) -> None:
    mask = draw(6, size=100)
    a = run(pipe, mask, "", generator=seeded(0))
    assert torch.equal(a, run(pipe, resize(mask, SIZE, SIZE), "", generator=seeded(0)))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (48, 80), (112, 32)])
def test_any_multiple_of_16(pipe: Pipeline, height: int, width: int) -> None:
    assert run(pipe, draw(1), "", height=height, width=width).shape == (1, 3, height, width)


@pytest.mark.quick
def test_a_bad_size_names_the_nearest(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="height must be a multiple of 16, got 100; the nearest is 96"):
        run(pipe, None, None, height=100)


def test_numpy_s_numbers_are_numbers(pipe: Pipeline) -> None:
    a = run(pipe, None, None, num_inference_steps=np.int32(2), height=np.int64(32), guidance_scale=np.float32(2))
    assert a.shape == (1, 3, 32, SIZE)
    with pytest.raises(InputError, match=r"got (np.int64\()?70\)?; the nearest is 64"):
        run(pipe, None, None, height=np.int64(70))


def test_numbers_of_all_kinds_draw_the_same(pipe: Pipeline) -> None:
    """A first call with numbers of one kind doesn't decide which kinds later calls of the same shape may have."""
    kinds: list[Callable[[float], Any]] = [float, np.float64, np.float32, Fraction]
    images = []
    for kind in kinds:
        scales = {f"{name}_scale": kind(x) for name, x in (("guidance", 2), ("condition", 0.5), ("position", 1.5))}
        delta = (kind(1), kind(-2))
        images.append(run(pipe, draw(1), "a", generator=seeded(0), position_delta=delta, **scales))
    assert all(torch.equal(image, images[0]) for image in images[1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_process_s_defaults_change_nothing(dtype: torch.dtype, tiny_bundle: Path, pipe: Pipeline) -> None:
    expected = run(pipe, draw(1), "a", generator=seeded(0))
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")  # a tensor that is made there by mistake holds no values
    try:
        again = run(pipe, draw(1), "a", generator=seeded(0), height=SIZE + 16)
        again = run(pipe, draw(1), "a", generator=seeded(0))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(again, expected)


def test_threads_take_turns(pipe: Pipeline) -> None:
    jobs: list[dict[str, Any]] = [{"mask": draw(i), "prompt": str(i), "guidance_scale": float(i)} for i in (1, 2)]

    def image(job: dict[str, Any]) -> Tensor:
        return run(pipe, generator=seeded(0), **job)

    alone = [image(job) for job in jobs]
    with ThreadPoolExecutor(2) as threads:
        for i, together in enumerate(threads.map(image, jobs * 6)):
            assert torch.equal(together, alone[i % 2])


def test_a_callback_may_not_call_its_own_pipeline(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="can't be called from within its own call; make another Pipeline"):
        run(pipe, None, None, callback_on_step_end=lambda pipe, *_: pipe(None, None))
    run(pipe, None, None)  # the pipeline is free again


def test_a_tuple_if_asked_for(pipe: Pipeline) -> None:
    expected = run(pipe, draw(1), "a", generator=seeded(0))
    options: dict[str, Any] = {"num_inference_steps": 3, "height": SIZE, "width": SIZE, "output_type": "pt"}
    (images,) = pipe(draw(1), "a", generator=seeded(0), return_dict=False, **options)
    assert torch.equal(images, expected)


def test_a_callback_that_returns_no_dict(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="must return a dict or None, got int"):
        run(pipe, None, None, callback_on_step_end=lambda *_: 3)


def test_output_types(pipe: Pipeline) -> None:
    def draw_as(kind: OutputType) -> Any:
        return pipe(draw(1), "", 2, height=SIZE, width=SIZE, generator=seeded(0), output_type=kind).images

    (image,), array, tensor = draw_as("pil"), draw_as("np"), draw_as("pt")
    assert isinstance(image, Image.Image)
    assert image.size == (SIZE, SIZE)
    assert array.shape == (1, SIZE, SIZE, 3)
    assert tensor.shape == (1, 3, SIZE, SIZE)
    assert 0 <= tensor.min() < tensor.max() <= 1
    assert draw_as("latent").shape == (1, 16, 64)
    assert np.allclose(np.asarray(image) / 255, array[0], atol=1 / 255)


def test_given_latents_are_the_noise(pipe: Pipeline) -> None:
    noise = pack_latents(torch.randn(1, 16, SIZE // 8, SIZE // 8, generator=seeded(3)))
    assert torch.equal(run(pipe, draw(1), "", latents=noise), run(pipe, draw(1), "", generator=seeded(3)))


@pytest.mark.quick
def test_every_option_changes_the_image(pipe: Pipeline) -> None:
    base = run(pipe, draw(1), "a face", generator=seeded(0))
    for option in (
        {"guidance_scale": 7.0},
        {"condition_scale": 0.3},
        {"position_delta": (2, 0)},
        {"position_scale": 2.0},
        {"num_inference_steps": 4},
        {"max_sequence_length": 16},
        {"mask_posterior": "sample"},
    ):
        assert relative_rms(run(pipe, draw(1), "a face", generator=seeded(0), **option), base) > 1e-5, option


@pytest.mark.quick
def test_sampled_posterior_follows_the_generator(pipe: Pipeline) -> None:
    mask = draw(1, size=32)

    def sample(seeds: list[int]) -> Tensor:
        generators = [seeded(s) for s in seeds]
        return pipe.conditioner([mask] * len(seeds), posterior="sample", generators=generators).stacked()

    assert torch.equal(sample([1]), sample([1]))
    assert torch.equal(sample([1, 2])[1:], sample([2]))
    many = sample(list(range(200)))  # in one call, which encodes every distinct picture once
    mean, spread = pipe.conditioner([mask]).stacked(), many.std(0)
    assert (spread > 0).all()
    # The posterior's mean is the mean of its samples: within 6 standard errors everywhere.
    assert ((many.mean(0) - mean).abs() <= 6 * spread / 200**0.5 + 1e-6).all()


@pytest.fixture
def encoded(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the pictures that the VAE encodes, from an empty cache on."""
    counts: list[int] = []
    encode = pipe.conditioner._encode

    def counted(pictures: list[Any]) -> Tensor:
        counts.append(len(pictures))
        return encode(pictures)

    monkeypatch.setattr(pipe.conditioner, "_encode", counted)
    pipe.conditioning_cache.clear()
    return counts


def test_equal_planes_are_encoded_once(pipe: Pipeline, encoded: list[int]) -> None:
    mask = draw(1)
    first = pipe.conditioner([mask, mask])
    distinct = 1 + len(np.unique(mask)) + 1  # the palette, each class present, one black plane
    assert encoded == [distinct]
    assert len(first.planes) == distinct
    assert np.array_equal(first.index[0], first.index[1])
    again = pipe.conditioner([mask])
    assert torch.equal(again.planes, first.planes)
    assert np.array_equal(again.index, first.index[:1])
    assert encoded == [distinct]


def test_masks_of_a_batch_share_planes(pipe: Pipeline, encoded: list[int]) -> None:
    """Masks with a region in common share its plane, and each mask gets the latents that it would get alone."""
    first = draw(1)
    second = first.copy()
    second[first == np.unique(first)[-1]] = np.unique(first)[0]
    both = pipe.conditioner([first, second])
    alone = [pipe.conditioner([mask]) for mask in (first, second)]
    assert len(both.planes) == sum(encoded) < sum(len(masks.planes) for masks in alone)
    assert torch.equal(both.stacked(), torch.cat([masks.stacked() for masks in alone]))


def test_images_of_one_mask_share_its_planes(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Conditions] = []
    prepare = pipe.engine.prepare

    def noted(conditions: Conditions, schedule: Schedule) -> object:
        given.append(conditions)
        return prepare(conditions, schedule)

    monkeypatch.setattr(pipe.engine, "prepare", noted)
    run(pipe, [draw(1), draw(2)], "", num_images_per_prompt=2)
    masks = given[0].masks
    assert len(masks.planes) == len(pipe.conditioner([draw(1), draw(2)]).planes)
    rows = masks.index.tolist()
    assert rows[0] == rows[1] != rows[2] == rows[3]


def test_a_mask_of_background_is_two_pictures(pipe: Pipeline, encoded: list[int]) -> None:
    """The palette picture is black, as are the planes of absent classes; only the background's own plane is white."""
    masks = pipe.conditioner([np.zeros((SIZE, SIZE), dtype=np.uint8)])
    assert encoded == [2]
    assert masks.index.tolist() == [[0, 1] + [0] * 18]


def test_an_edit_encodes_what_it_changes(pipe: Pipeline, encoded: list[int]) -> None:
    mask = draw(1)
    pipe.conditioner([mask])
    a, b = np.unique(mask)[:2]
    edited = mask.copy()
    edited[np.nonzero(mask == a)[0][0], np.nonzero(mask == a)[1][0]] = b
    changed = pipe.conditioner([edited]).stacked()
    assert encoded[1:] == [3]  # the palette and the two planes between which a pixel moved
    pipe.conditioning_cache.clear()
    assert_close(pipe.conditioner([edited]).stacked(), changed, rms=1e-5)


def test_the_cache_is_bounded_and_can_be_off(tiny_bundle: Path) -> None:
    entry, key = (
        SIZE // 16 * (SIZE // 16) * 64 * 4,
        500,
    )  # one picture's latents in float32, and at most so much for its key
    small = Pipeline(tiny_bundle, device="cpu", dtype="fp32", cache_bytes=5 * (entry + key))
    off = Pipeline(tiny_bundle, device="cpu", dtype="fp32", cache_bytes=0)
    for seed in range(3):
        kept, made_anew = (p.conditioner([draw(seed)]).stacked() for p in (small, off))
        assert_close(kept, made_anew, rms=1e-5)
        assert len(small.conditioning_cache) == 5
        assert 5 * entry < small.conditioning_cache.nbytes <= 5 * (entry + key)
    assert len(off.conditioning_cache) == off.conditioning_cache.nbytes == 0


def test_prompts_are_encoded_once(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.prompt_cache.clear()
    first = run(pipe, None, ["a hat", "a beard", "a hat"], generator=[seeded(0)] * 3)
    assert len(pipe.prompt_cache) == 2
    assert pipe.prompt_encoder.encoders is not None
    monkeypatch.setattr(pipe.prompt_encoder.encoders, "encode", None)  # a call of it would fail
    assert_close(run(pipe, None, "a hat", generator=seeded(0)), first[:1], rms=1e-5)


@pytest.mark.quick
def test_callback_sees_and_replaces_latents(pipe: Pipeline) -> None:
    seen: list[tuple[int, float]] = []

    def callback(p: Pipeline, step: int, timestep: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        assert p is pipe
        seen.append((step, float(timestep)))
        return {"latents": torch.zeros_like(values["latents"])} if step == 1 else {}

    changed = run(pipe, draw(1), "", generator=seeded(0), callback_on_step_end=callback)
    assert [s for s, _ in seen] == [0, 1, 2]
    assert seen[0][1] == 1000.0
    assert relative_rms(changed, run(pipe, draw(1), "", generator=seeded(0))) > 1e-3


def test_callback_may_edit_latents_in_place(pipe: Pipeline) -> None:
    """As in diffusers, the callback may return the latents or not. An edit of the last step, or of the step that
    the callback interrupts, is in the result."""

    def edited(returns: bool, stop_at: int | None = None) -> Tensor:
        def callback(p: Pipeline, step: int, timestep: Tensor, values: dict[str, Any]) -> dict[str, Any] | None:
            values["latents"].mul_(0.5)
            p.interrupt = step == stop_at
            return values if returns else None

        return run(pipe, draw(1), "", generator=seeded(0), output_type="latent", callback_on_step_end=callback)

    def replaced(p: Pipeline, step: int, timestep: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"] * 0.5}

    expected = run(pipe, draw(1), "", generator=seeded(0), output_type="latent", callback_on_step_end=replaced)
    assert torch.equal(edited(returns=True), expected)
    assert torch.equal(edited(returns=False), expected)
    assert not torch.equal(run(pipe, draw(1), "", generator=seeded(0), output_type="latent"), expected)
    seen: list[Tensor] = []

    def watched(p: Pipeline, step: int, timestep: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(values["latents"] * 0.5)
        return {"latents": seen[-1]}

    run(pipe, draw(1), "", generator=seeded(0), output_type="latent", callback_on_step_end=watched)
    assert torch.equal(edited(returns=False, stop_at=0), seen[0])


def test_interrupting_from_the_callback(pipe: Pipeline) -> None:
    steps: list[int] = []

    def callback(p: Pipeline, step: int, timestep: Tensor, values: dict[str, Any]) -> None:
        steps.append(step)
        p.interrupt = step == 1

    run(pipe, None, None, num_inference_steps=6, callback_on_step_end=callback)
    assert steps == [0, 1]
    assert pipe.last_run.interrupted
    run(pipe, None, None)
    assert not pipe.last_run.interrupted


def test_progress_bar(pipe: Pipeline, capfd: pytest.CaptureFixture[str]) -> None:
    run(pipe, None, None)
    assert capfd.readouterr().err == ""  # not a terminal
    try:
        pipe.set_progress_bar_config(disable=False)
        run(pipe, None, None)
        drawn = capfd.readouterr().err
        pipe.set_progress_bar_config(disable=False, desc="faces")
        run(pipe, None, None)
        described = capfd.readouterr().err
        with pytest.raises(InputError):
            run(pipe, None, None, callback_on_step_end=lambda *_: 1)
        failed = capfd.readouterr().err
    finally:
        pipe.set_progress_bar_config()
    assert "3/3" in drawn
    stages = [drawn.index(f"{stage}:") for stage in ("text", "mask", "prepare", "denoise", "decode")]
    assert stages == sorted(stages)  # each stage is shown when it begins
    assert "faces: 100%" in described
    assert "prepare" not in described
    assert failed.rstrip(" ").endswith("\r")  # the bar is wiped: what follows is the error's message


def test_the_bar_s_rate_is_that_of_steps(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each step takes a second. Preparing takes an hour, which the rate leaves out."""
    clock, prepare = [0.0], pipe.engine.prepare

    def slow_prepare(*args: Any) -> None:
        clock[0] += 3600
        prepare(*args)

    def slow_step(*_: object) -> None:
        clock[0] += 1

    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    monkeypatch.setattr(pipe.engine, "prepare", slow_prepare)
    monkeypatch.setattr(pipe, "_progress_bar_config", {"disable": False})
    run(pipe, None, None, num_inference_steps=4, callback_on_step_end=slow_step)
    last = capfd.readouterr().err.rstrip().split("\r")[-1]
    assert "4/4 [00:04<00:00" in last, last


def test_the_run_is_reported(pipe: Pipeline) -> None:
    run(pipe, draw(1), ["a", "b"])
    report = pipe.last_run
    assert (report.batch_size, report.steps) == (2, 3)
    assert set(report.seconds) == {"text", "mask", "prepare", "denoise", "decode"}
    assert all(s > 0 for s in report.seconds.values())


def test_latents_are_decoded_to_the_images_of_a_call(pipe: Pipeline) -> None:
    call: dict[str, Any] = {"seed": 2, "height": 32, "width": 48}
    latents = run(pipe, draw(1), ["a", "b"], output_type="latent", **call)
    assert torch.equal(pipe.decode(latents, 32, 48, "pt"), run(pipe, draw(1), ["a", "b"], **call))
    assert [image.size for image in pipe.decode(latents, 32, 48)] == [(48, 32)] * 2
    with pytest.raises(InputError, match=r"latents must have shape \[2, 6, 64\], got"):
        pipe.decode(run(pipe, draw(1), ["a", "b"], output_type="latent"), 32, 48)
    with pytest.raises(InputError, match="height and width must be multiples of 16, got 32 and 50"):
        pipe.decode(latents, 32, 50)


@pytest.mark.quick
def test_most_steps_are_an_exact_run_of_a_shorter_schedule(pipe: Pipeline) -> None:
    exact = run(pipe, draw(1), "a", seed=1, num_inference_steps=2)
    other = run(pipe, draw(1), "a", seed=1, num_inference_steps=5)
    pipe.fast = FastConfig(most_steps=2)
    try:
        assert torch.equal(run(pipe, draw(1), "a", seed=1, num_inference_steps=5), exact)
        assert (pipe.last_run.steps, pipe.last_run.computed_steps) == (2, 2)
        run(pipe, draw(1), "a", seed=1, num_inference_steps=1)
        assert pipe.last_run.steps == 1  # not more than are asked for
    finally:
        pipe.fast = None
    assert not torch.equal(other, exact)


def test_without_text_encoders(tiny_files: Files, tmp_path: Path) -> None:
    pipe = Pipeline(tiny_files.convert(tmp_path / "b.safetensors", text_encoders=False), dtype="fp32")
    with pytest.raises(CheckpointError, match="pass prompt_embeds"):
        run(pipe, None, "a face")
    embeds = {"prompt_embeds": torch.randn(1, 5, 24), "pooled_prompt_embeds": torch.randn(1, 16)}
    assert run(pipe, None, None, **embeds).shape == (1, 3, SIZE, SIZE)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_draws_a_similar_image(tiny_bundle: Path, pipe: Pipeline, dtype: str) -> None:
    """The image differs from float32's, which shows that the dtype was used, but only by the roundings of its layers."""
    half = Pipeline(tiny_bundle, device="cpu", dtype=dtype)
    options: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 32}
    a = run(half, draw(1), "a face", generator=seeded(0), **options)
    b = run(pipe, draw(1), "a face", generator=seeded(0), **options)
    unit = 2.0**-8 if dtype == "bf16" else 2.0**-11
    assert 0.1 * unit < relative_rms(a.float(), b) < (0.1 if dtype == "bf16" else 0.02)


def test_packing_is_flux_s_and_unpacks() -> None:
    from diffusers import FluxPipeline

    z = torch.randn(2, 16, 6, 10)
    packed = pack_latents(z)
    assert torch.equal(packed, FluxPipeline._pack_latents(z, 2, 16, 6, 10))
    assert torch.equal(unpack_latents(packed, 48, 80), z)


def test_the_pipeline_calls_any_engine(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop uses no more of an engine than `denoise.Denoiser` has."""
    steps: list[None] = []
    monkeypatch.setattr(pipe.engine, "advance", lambda: steps.append(None))
    noise = pipe(None, None, 4, height=SIZE, width=SIZE, generator=seeded(0), output_type="latent").images
    assert len(steps) == 4
    assert isinstance(noise, Tensor)
    assert torch.equal(noise, pack_latents(torch.randn(1, 16, 8, 8, generator=seeded(0))))


def test_an_interrupt_while_inputs_are_copied_leaves_no_mixed_tables(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run with the first prompt computes its modulations anew, since a part of them was overwritten."""
    from mogle_rt.loop.buffers import tensors_of

    g = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 4, TINY.joint_attention_dim, generator=g)
    pooled = [torch.randn(1, TINY.pooled_projection_dim, generator=g) for _ in range(2)]
    pipe = Pipeline(tiny_bundle, device="cpu", dtype="fp32")

    def draw(which: int) -> Tensor:
        images = pipe(
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled[which],
            num_inference_steps=2,
            height=32,
            width=32,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
        ).images
        assert isinstance(images, Tensor)
        return images

    expected = draw(0)
    before = tensors_of
    double = pipe.engine.prepared.inputs.modulation.double  # type: ignore[attr-defined]

    class Interrupting(Tensor):
        """A tensor that raises right after it was copied over the modulations."""

    def with_an_interrupt(values: object) -> list[Tensor]:
        found = before(values)
        return [t.as_subclass(Interrupting) if t is double else t for t in found]

    def copy_then_fail(self: Tensor, other: Tensor) -> Tensor:
        double.copy_(other)
        raise KeyboardInterrupt

    Interrupting.copy_ = copy_then_fail  # type: ignore[method-assign,assignment]
    with monkeypatch.context() as patch:
        patch.setattr("mogle_rt.loop.step.tensors_of", with_an_interrupt)
        with pytest.raises(KeyboardInterrupt):
            draw(1)
    assert torch.equal(draw(0), expected)
