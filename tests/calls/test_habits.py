"""The habits of people who know diffusers: their names work, or an error says in a sentence why not."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from mogle_rt import CheckpointError, ConfigError, DeviceError, DownloadError, InputError, MaskError, Pipeline
from mogle_rt.arguments import generator_list
from mogle_rt.calls import habits
from mogle_rt.calls.habits import DEFAULT_FILE

SIZE = 32


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Pipeline:
    return Pipeline(tiny_bundle, device="cpu", dtype="fp32")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(pipe: Pipeline, prompt: Any = "a hat", **options: Any) -> Tensor:
    settings: dict[str, Any] = {"num_inference_steps": 2, "height": SIZE, "width": SIZE, "output_type": "pt"}
    if not {"seed", "generator"} & set(options):
        settings["seed"] = 0
    images = pipe(None, prompt, **settings | options).images
    assert isinstance(images, Tensor)
    return images


def test_from_pretrained_takes_a_path_a_folder_and_demo(tiny_bundle: Path, pipe: Pipeline, tmp_path: Path) -> None:
    expected = run(pipe)
    made = Pipeline.from_pretrained(tiny_bundle, torch_dtype=torch.float32, device="cpu", use_safetensors=True)
    assert torch.equal(run(made), expected)
    shutil.copy(tiny_bundle, tmp_path / DEFAULT_FILE)
    made = Pipeline.from_pretrained(str(tmp_path), dtype="fp32", device="cpu", low_cpu_mem_usage=True)
    assert torch.equal(run(made), expected)
    demo = Pipeline.from_pretrained("demo", torch_dtype=torch.bfloat16, device="cpu")
    assert demo.dtype == torch.bfloat16


def test_from_pretrained_fetches_a_hub_id(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tiny_bundle)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for name in ("owner/faces", "owner/faces/other.safetensors"):
        assert Pipeline.from_pretrained(name, torch_dtype="fp32", device="cpu").bundle.path == tiny_bundle
    assert asked == [("owner/faces", DEFAULT_FILE), ("owner/faces", "other.safetensors")]


@pytest.mark.quick
def test_from_pretrained_says_what_a_diffusers_folder_becomes(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a folder without a bundle ckpt\.safetensors"):
        Pipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"mogle-rt convert --flux .* makes a bundle of it"):
        Pipeline.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="mogle-rt convert --released"):
        Pipeline.from_pretrained("black-forest-labs/FLUX.1-dev")
    with pytest.raises(DownloadError, match="can't be reached"):  # tests are offline
        Pipeline.from_pretrained("owner/faces")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "fp16"}, "variant is not supported: a bundle is one file"),
        ({"transformer": object()}, "transformer is not supported"),
        ({"use_safetensors": False}, "use_safetensors must be True"),
        ({"torch_dtype": torch.float32, "dtype": "bf16"}, "torch_dtype is torch.float32 and dtype is bf16"),
    ],
)
def test_from_pretrained_refuses_options_of_folders(options: dict[str, Any], message: str, tiny_bundle: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        Pipeline.from_pretrained(tiny_bundle, **options)


def test_from_pretrained_with_an_unknown_option(tiny_bundle: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'divice'"):
        Pipeline.from_pretrained(tiny_bundle, divice="cpu")


def test_to_changes_the_dtype_and_back(tiny_bundle: Path, pipe: Pipeline) -> None:
    expected = run(pipe)
    moved = Pipeline(tiny_bundle, device="cpu", dtype="fp32")
    run(moved)
    engine = moved.engine
    assert moved.to("cpu") is moved
    assert moved.to(device="cpu", dtype=torch.float32).engine is engine  # it is there already
    assert moved.to(torch.float16) is moved
    assert moved.dtype == torch.float16
    assert torch.equal(run(moved), run(Pipeline(tiny_bundle, device="cpu", dtype="fp16")))
    assert moved.to("cpu", "fp32").dtype == torch.float32
    assert torch.equal(run(moved), expected)


def test_to_refuses_what_cannot_be_and_leaves_all_as_it_was(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, engine = run(pipe), pipe.engine
    with pytest.raises(DeviceError, match="device must be cpu"):
        pipe.to("tpu")
    with pytest.raises(DeviceError, match="PyTorch sees"):
        pipe.to("cuda:77")
    with pytest.raises(ConfigError, match="dtype must be bf16, fp16 or fp32"):
        pipe.to(torch.float64)
    with pytest.raises(InputError, match=r"to\(\) takes one dtype"):
        pipe.to(torch.float32, torch.float16)
    with pytest.raises(TypeError, match="'non_blocking'"):
        pipe.to("cpu", non_blocking=True)
    assert pipe.engine is engine

    from mogle_rt.encoders.vae import load_autoencoder

    def fails_in_half(*arguments: Any) -> Any:
        if pipe.dtype == torch.float16:
            raise CheckpointError("it doesn't fit")
        return load_autoencoder(*arguments)

    monkeypatch.setattr("mogle_rt.pipeline.load_autoencoder", fails_in_half)
    with pytest.raises(CheckpointError, match="it doesn't fit"):
        pipe.to(torch.float16)
    assert torch.equal(run(pipe), expected)


def test_loras_do_not_get_lost_silently(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipeline(tiny_bundle, device="cpu", dtype="fp32")
    monkeypatch.setattr(pipe.engine, "styles", SimpleNamespace(names=["sketch"]), raising=False)
    with pytest.raises(InputError, match="can't be moved with its LoRAs"):
        pipe.to(torch.float16)
    with pytest.raises(InputError, match="can't be copied or pickled with its LoRAs"):
        pipe.__reduce__()


def test_offloaded_text_encoders_are_gone_after_each_prompt(tiny_bundle: Path, pipe: Pipeline) -> None:
    expected = run(pipe, "a red hat")
    offloading = Pipeline(tiny_bundle, device="cpu", dtype="fp32")
    offloading.enable_model_cpu_offload()
    for _ in range(2):
        assert torch.equal(run(offloading, "a red hat"), expected)
        assert offloading.prompt_encoder.encoders is None
        offloading.prompt_cache.clear()
    assert pipe.prompt_encoder.encoders is not None
    with pytest.raises(DeviceError):
        offloading.enable_model_cpu_offload(gpu_id=77)
    offloading.enable_model_cpu_offload(device="cpu")


def test_offload_stays_on_after_to(tiny_bundle: Path) -> None:
    pipe = Pipeline(tiny_bundle, device="cpu", dtype="fp16")
    pipe.enable_model_cpu_offload()
    run(pipe.to(torch.float32))
    assert pipe.prompt_encoder.encoders is None


def test_what_is_not_needed_changes_nothing(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    expected = run(pipe)
    pipe.enable_vae_slicing()
    pipe.disable_vae_slicing()
    pipe.enable_attention_slicing()
    pipe.enable_xformers_memory_efficient_attention()
    assert not caplog.messages
    assert torch.equal(run(pipe), expected)


def test_tiles_take_less_memory_and_change_larger_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of at most a tile's size are the same to the bit, and so is every image once tiles are off again."""
    monkeypatch.setattr(habits, "VAE_TILE", 128)
    pipe = Pipeline("demo", device="cpu", dtype="fp16")
    settings: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt", "seed": 0}
    pipe.enable_vae_tiling()
    pipe.to(torch.float32)  # it stays on
    whole = Pipeline("demo", device="cpu", dtype="fp32")
    mask = np.zeros((256, 256), dtype=np.uint8)
    mask[64:192, 96:160] = 1

    def images(pipeline: Pipeline, size: int) -> Tensor:
        made = pipeline(mask, "a hat", height=size, width=size, **settings).images
        assert isinstance(made, Tensor)
        return made

    assert torch.equal(images(pipe, 128), images(whole, 128))
    tiled, expected = images(pipe, 256), images(whole, 256)
    assert pipe.plan.stages["decode"] < whole.plan.stages["decode"]
    psnr = -10 * torch.log10((tiled - expected).square().mean()).item()
    assert 20 < psnr < 60, psnr
    pipe.disable_vae_tiling()
    assert torch.equal(images(pipe, 256), expected)


def test_sequential_offload_streams_all_weights(tiny_bundle: Path) -> None:
    """Sequential offload stays on after ``to``, and images are the same to the bit."""
    pipe = Pipeline(tiny_bundle, device="cpu", dtype="fp16")
    pipe.enable_sequential_cpu_offload(device="cpu")
    offloaded = run(pipe.to(torch.float32))
    assert len(pipe.plan.streamed) == pipe.plan.sublayers > 0
    assert torch.equal(offloaded, run(Pipeline(tiny_bundle, device="cpu", dtype="fp32")))
    with pytest.raises(DeviceError):
        pipe.enable_sequential_cpu_offload(gpu_id=77)


SOMETHING: dict[str, Any] = {"true_cfg_scale": 4.0, "joint_attention_kwargs": {"scale": 0.5}}


def test_every_argument_of_flux_is_known_or_refused_by_name(pipe: Pipeline) -> None:
    """A value that asks for nothing, such as None or diffusers' default, is accepted."""
    known = set(inspect.signature(Pipeline.__call__).parameters)
    others = {k: v for k, v in inspect.signature(FluxPipeline.__call__).parameters.items() if k not in known}
    assert {"negative_prompt", "true_cfg_scale", "prompt_2", "sigmas"} <= set(others)
    for name, parameter in others.items():
        with pytest.raises(InputError, match=f"^{name} (is not supported: |must be left out)"):
            run(pipe, **{name: SOMETHING.get(name, ["x"])})
        if parameter.default is not None:
            run(pipe, **{name: parameter.default})
    run(pipe, **dict.fromkeys(set(others) - {"true_cfg_scale"}))


def test_a_negative_prompt_is_told_of_distillation(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match=r"FLUX\.1-dev is distilled"):
        run(pipe, negative_prompt="ugly")
    with pytest.raises(InputError, match=r"FLUX\.1-dev is distilled"):
        run(pipe, true_cfg_scale=True)


@pytest.mark.parametrize("name", ["image", "mask_image", "control_image"])
def test_arguments_of_other_pipelines_of_flux(name: str, pipe: Pipeline) -> None:
    with pytest.raises(
        InputError, match=rf"^{name} is not supported: the mask is the first argument.*edit, inpaint or"
    ):
        run(pipe, **{name: "face.png"})
    run(pipe, **{name: None})


def test_unknown_arguments(pipe: Pipeline) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'promt'"):
        run(pipe, promt="a")


def test_prompt_2_may_say_the_same(pipe: Pipeline) -> None:
    assert torch.equal(run(pipe, "a hat", prompt_2="a hat"), run(pipe, "a hat"))
    with pytest.raises(InputError, match="prompt_2 must be left out or equal prompt"):
        run(pipe, "a hat", prompt_2="a beard")


@pytest.mark.parametrize("first", ["a woman with red hair", ["a woman, smiling", "a man."]])
def test_the_prompt_first(first: Any, pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MaskError, match=r"reads like a prompt: masks come first, so write pipe\(mask, prompt\)"):
        pipe(first)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MaskError, match="no such file"):  # a file's name with a space in it is no prompt
        pipe("my mask.png")


def test_callbacks_find_what_they_know(pipe: Pipeline) -> None:
    seen: list[tuple[Any, ...]] = []

    def look(p: Pipeline, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, p.num_timesteps, p.guidance_scale, p.interrupt, p.device.type, p.dtype))
        return tensors

    run(pipe, guidance_scale=2.5, callback_on_step_end=look)
    assert seen == [(step, 2, 2.5, False, "cpu", torch.float32) for step in range(2)]
    with pytest.raises(InputError, match="a callback can't change prompt_embeds"):
        run(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])


@pytest.mark.quick
def test_a_seed_is_a_generator_for_each_image(pipe: Pipeline) -> None:
    both = run(pipe, ["a", "b"], seed=5)
    assert torch.equal(both, run(pipe, ["a", "b"], generator=[seeded(5), seeded(6)]))
    assert torch.equal(run(pipe, ["a", "b"], seed=[5, 6]), both)
    assert not torch.equal(run(pipe, ["a", "b"], seed=[5, 5]), both)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1, "generator": seeded(1)}, "a seed or a generator, not both"),
        ({"seed": [1, 2]}, "one number or a list of 1"),
        ({"seed": []}, "one number or a list of 1"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": 2**63}, "seed must be a whole number from 0"),
        ({"seed": 1.5}, "seed must be a whole number from 0"),
        ({"seed": "7"}, "seed must be a whole number from 0"),
        ({"seed": True}, "seed must be a whole number from 0"),
    ],
)
def test_wrong_seeds(options: dict[str, Any], message: str, pipe: Pipeline) -> None:
    with pytest.raises(InputError, match=message):
        run(pipe, **options)


def test_a_generator_of_another_device() -> None:
    """A CPU's generator serves every device, as in diffusers; a GPU's can't draw the noise of a pipeline on a CPU."""

    class OfAGpu(torch.Generator):
        device = torch.device("cuda")

    cuda = torch.device("cuda")
    assert generator_list(seeded(0), 1, cuda) is None
    assert generator_list(OfAGpu(), 1, cuda) is None
    for generator in (OfAGpu(), [OfAGpu()]):
        with pytest.raises(InputError, match="generator is on cuda and the pipeline on cpu"):
            generator_list(generator, 1, torch.device("cpu"))


def test_encode_prompt_is_what_a_call_takes(pipe: Pipeline) -> None:
    embeds, pooled, ids = pipe.encode_prompt("a red hat")
    assert ids.shape == (embeds.shape[1], 3)
    assert not ids.any()
    given = run(pipe, None, prompt_embeds=embeds, pooled_prompt_embeds=pooled)
    assert torch.equal(given, run(pipe, "a red hat"))
    repeated = pipe.encode_prompt(["a", "b"], num_images_per_prompt=2)
    assert torch.equal(repeated[0][1], repeated[0][0])
    assert torch.equal(pipe.encode_prompt("", prompt_embeds=embeds, pooled_prompt_embeds=pooled)[0], embeds)
    mixed = pipe.encode_prompt("a red hat", "a beard")
    assert torch.equal(mixed[1], pooled)
    assert torch.equal(mixed[0], pipe.encode_prompt("a beard")[0])


WRONG: list[Callable[[Pipeline], object]] = [
    lambda p: p.encode_prompt("a", ["b", "c"]),
    lambda p: p.encode_prompt("a", num_images_per_prompt=0),
    lambda p: p.encode_prompt("a", max_sequence_length=0),
    lambda p: p.encode_prompt("a", lora_scale=0.5),  # type: ignore[arg-type]
    lambda p: p.encode_prompt(None, prompt_embeds=torch.zeros(1, 5, 24)),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("call", WRONG)
def test_encode_prompt_refuses(call: Callable[[Pipeline], object], pipe: Pipeline) -> None:
    with pytest.raises(InputError):
        call(pipe)


def test_repr_tells_what_it_is(pipe: Pipeline, tiny_bundle: Path) -> None:
    run(pipe)
    said = repr(pipe)
    assert said.startswith(f"Pipeline({str(tiny_bundle)!r}, device='cpu', dtype='float32', engine='torch', weights=")
    assert pipe.engine.weight_formats in said
